"""The CUDA kernels, executed on a CPU: partition_merge_cuda.cu and ops.cpp's CUDA path against float64.

tests/cuda_on_cpu/ has stubs for CUDA's headers: every thread of every block runs, one at a time, in random
order.  This does not test nvcc's code, GPU memory or speed.  The kernels run in a separate process, so that a
crash does not end the tests; `python tests/test_cuda_on_cpu.py -g -O0` runs them alone (docs/kernels.md).

A load or store of 16 bytes at an address that they do not divide, which a GPU refuses and a CPU does not,
stops the process: -fsanitize=alignment is on unless CUDA_ON_CPU gives other flags.  Use more sanitizers after
every change of a kernel, and real threads, to find races in shared memory (ten times fewer cases):

    export CUDA_ON_CPU="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    export CUDA_ON_CPU="-O1 -g -fsanitize=thread -DREAL_THREADS"
    pytest --slow tests/test_cuda_on_cpu.py
"""
import ctypes
import math
import multiprocessing
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

HERE, ROOT = pathlib.Path(__file__).parent / "cuda_on_cpu", pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                                       # for the debugger: pytest has conftest.py
from helpers import OPERATORS, arguments, check_operators, operator_case, operator_cases  # noqa: E402

pytestmark = pytest.mark.slow                                       # to build
COMPILER = os.environ.get("CXX", "c++").split()[0]
FLAGS = os.environ.get("CUDA_ON_CPU", "-O1 -fsanitize=alignment -fno-sanitize-recover=all").split()
REAL_THREADS = "-DREAL_THREADS" in FLAGS
ANY = 2 ** 31 - 1                                                   # blocks per grid: no limit but CUDA's


def build(folder, flags):
    """ops.cpp's functions, built for a CPU, as a module, and those of kernels.cpp by ctypes."""
    from torch.utils.cpp_extension import load                      # needs setuptools

    sys.setdlopenflags(os.RTLD_LAZY)                                # ops.cpp's CPU kernels are not linked
    module = load(
        "cuda_on_cpu", [str(ROOT / "csrc/ops.cpp"), str(HERE / "kernels.cpp")], build_directory=folder,
        extra_cflags=["-DWITH_CUDA", "'-DON_CUDA(tensor)=true'", "-fno-strict-aliasing", *flags],
        extra_ldflags=["-Wl,-z,lazy", *(flag for flag in flags if "sanitize" in flag)],
        extra_include_paths=[str(HERE)], with_cuda=False)
    torch.use_deterministic_algorithms(True)                        # fills torch.empty with NaN
    return module, ctypes.CDLL(module.__file__)


def windows_h(library, *args):
    """Arguments: B, H, W, heads, d, M, strip, one of its tokens, third, head; result: see kernels.cpp."""
    answer = (ctypes.c_int64 * 12)()
    library.windows_h((ctypes.c_int64 * 6)(*args[:6]), *map(ctypes.c_int64, args[6:]), answer)
    return list(answer)


def run(module, name, case):
    outputs = [torch.empty(case[key].shape, dtype=case[key].dtype) for key in OPERATORS[name][1].split()]
    getattr(module, name)(*arguments(name, case), *outputs)
    return outputs


def serve(connection, folder, flags):
    """Answer requests: a name, an operator's case or windows_h's arguments, and those of launch_with."""
    module, library = build(folder, flags)
    while True:
        try:
            name, case, launch = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        library.launch_with(*map(ctypes.c_int64, launch))
        try:
            answer = windows_h(library, *case) if name == "windows_h" else run(module, name, case)
        except RuntimeError as error:
            answer = error
        connection.send_bytes(pickle.dumps(answer))                 # `send` would use shared memory


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    """cuda(operator, case, ...) -> its outputs, from the other process; EOFError if it died (see its stderr).

    threads, blocks: upper limits per block and per grid; failing: index of the launch that fails; seed:
    determines the order in which blocks and threads run.
    """
    for program in (COMPILER, "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"the kernels cannot be built: there is no {program}")
    ours, theirs = multiprocessing.Pipe()
    names = [f"lib{name[0]}san.so" for name in ("address", "thread") if any(name in flag for flag in FLAGS)]
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, tmp_path_factory.mktemp("cuda_on_cpu"), FLAGS))
    with pytest.MonkeyPatch.context() as patch:
        if names:                                                   # sanitizers must be loaded before Python
            files = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
                     for name in [*names, "libstdc++.so.6"]]
            patch.setenv("LD_PRELOAD", " ".join(files))
            patch.setenv("ASAN_OPTIONS", "detect_leaks=0")
        process.start()
    theirs.close()

    def call(name, case, threads=64, blocks=ANY, failing=-1, seed=0):
        ours.send_bytes(pickle.dumps((name, case, (threads, blocks, failing, seed))))
        answer = pickle.loads(ours.recv_bytes())
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield call
    ours.close()
    process.join()
    assert process.exitcode == 0                                    # ThreadSanitizer only reports at exit


launches = st.fixed_dictionaries(dict(threads=st.sampled_from([32] if REAL_THREADS else [32, 48, 64, 256]),
                                      blocks=st.sampled_from([1, 3, ANY]), seed=st.integers(0, 99)))


def examples(n):
    return settings(max_examples=n // 10 if REAL_THREADS else n)


@examples(100)
@given(case=operator_cases(sizes=[3]), launch=launches)
def test_the_operators_against_float64(cuda, case, launch):
    check_operators(lambda name: cuda(name, case, **launch), case)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_every_stride_of_z_is_checked_before_wide_loads(cuda, broken):
    """Those of windows, heads and tokens, one of them odd: the sanitizer would stop at a load of 16 bytes."""
    strides = [1024, 256, 16, 1]
    strides[broken] += 1
    case = operator_case(1, 4, 8, heads=4, d=8, M=4)
    case["z"] = torch.randn(2048 + 8).as_strided((2, 4, 16, 8), strides)
    check_operators(lambda name: cuda(name, case), case)


@examples(40)
@given(case=operator_cases(sizes=[3]), launch=launches, other=launches)
def test_results_do_not_depend_on_the_order_of_threads_or_blocks(cuda, case, launch, other):
    """Nor on the number of blocks; that of threads per block does affect the order of summation."""
    other = other | {"threads": launch["threads"]}
    for name in ("window_merge_lim", "window_merge_lim_backward"):
        assert all(map(torch.equal, cuda(name, case, **launch), cuda(name, case, **other)))


@pytest.mark.parametrize("name, launches", zip(OPERATORS, [1, 1, 1, 2]))
def test_every_failed_launch_raises(cuda, name, launches):
    case = operator_case(1, 5, 9, heads=2, d=4, M=7)
    for failing in range(launches):
        with pytest.raises(RuntimeError, match="CUDA error"):
            cuda(name, case, failing=failing)
    cuda(name, case, failing=launches)                              # the one after the last: none was missed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_match_pytorch(cuda, dtype):
    """All 16-bit numbers to float32, and float32 numbers of all magnitudes, including ties, to 16 bits."""
    n = 2 ** 16
    every = torch.arange(n).to(torch.int16).view(dtype)
    halfway = every.float().add(torch.nextafter(every, every.new_tensor(math.inf)).float()).div(2)
    anything = torch.randint(-2 ** 31, 2 ** 31, (n,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    zeros = dict(qkv=every.new_zeros(1, 1, 1, 3 * n), weight=torch.zeros(n, 1, 3, 3), M=1)
    none, floats = torch.zeros_like(every), (halfway, halfway.nextafter(every.float()), anything)
    for z, bias, exact in [(every, torch.zeros(n), every), *[(none, x, x.to(dtype)) for x in floats]]:
        case = dict(zeros, z=z.view(1, 1, 1, n), bias=bias, grad=z.view(1, 1, 1, n))
        got, = cuda("window_merge_lim", case, threads=256)
        torch.testing.assert_close(got.flatten(), exact, rtol=0, atol=0, equal_nan=True)


@examples(100)
@given(data=st.data())
def test_indices_beyond_32_bits(cuda, data):
    """The index arithmetic of windows.h against Python's integers, for maps that would not fit in memory."""
    def number(*bounds):
        return data.draw(st.integers(*bounds))

    B, H, W, M = number(1, 64), number(1, 2 ** 18), number(1, 2 ** 18), number(1, 999)
    h, w, heads, d = -(-H // M), -(-W // M), number(1, 32), number(1, 64)
    b, wy, wx, third, head = (number(0, n - 1) for n in (B, h, w, 3, heads))
    row, i = number(0, M - 1), number(0, M - 1)
    y, x, window = wy * M + row, wx * M, (b * h + wy) * w + wx
    strip = (b * h * M + y) * w + wx                                # strips are numbered row by row
    group = ((third * B * h * w + window) * heads + head) * M * M + row * M + i
    merged = ((window * M * M + row * M + i) * heads + head) * d    # in (windows, M², heads, d)
    assert cuda("windows_h", (B, H, W, heads, d, M, strip, i, third, head)) == [
        B * h * w, B * h * w * M, b, y, x, window, row * M, min(M, W - x) if y < H else 0,
        b * H * W + y * W + x + i, group, merged, (b * h * M + wy * M) * w + wx]


if __name__ == "__main__":
    module, _ = build(tempfile.mkdtemp(), sys.argv[1:])
    print(run(module, "window_merge_lim", operator_case(1, 5, 9, heads=2, d=4, M=7)))
