"""The CUDA kernels, executed on a CPU: partition_merge_cuda.cu and ops.cpp's CUDA path against float64.

tests/cuda_on_cpu/ has stubs for CUDA's headers: every thread of every block runs, one at a time, in random order.
This does not test nvcc's code, GPU memory or speed.  The kernels run in a separate process, so that a crash does not
end the tests; this file is also the program of that process:

    pytest tests/test_cuda_on_cpu.py
    python tests/test_cuda_on_cpu.py -g -O0                        one small call, for a debugger (docs/kernels.md)

A load or store of 16 bytes at an address that they do not divide, which a GPU refuses and a CPU does not, stops the
process: -fsanitize=alignment is on unless CUDA_ON_CPU gives other flags.  Use more sanitizers after every change of a
kernel.  The second line runs real threads to find races in shared memory (ten times fewer cases, but still minutes):

    CUDA_ON_CPU="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" pytest tests/test_cuda_on_cpu.py
    CUDA_ON_CPU="-O1 -g -fsanitize=thread -DREAL_THREADS" pytest tests/test_cuda_on_cpu.py
"""
import ctypes
import math
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

HERE, ROOT = pathlib.Path(__file__).parent / "cuda_on_cpu", pathlib.Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()[0]
FLAGS = os.environ.get("CUDA_ON_CPU", "-O1 -fsanitize=alignment -fno-sanitize-recover=all").split()
REAL_THREADS = "-DREAL_THREADS" in FLAGS
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
ANY = 2 ** 31 - 1                                                  # blocks per grid: no limit but CUDA's


# ------------------------------------------------------------------------------------------------ the other process
def build(folder, flags):
    """Build the kernels for a CPU and load them: ops.cpp's functions as a module, those of kernels.cpp by ctypes."""
    from torch.utils.cpp_extension import load                     # needs setuptools; warns if there is no GPU

    sys.setdlopenflags(os.RTLD_LAZY)     # ops.cpp refers to the CPU kernels, which are not linked and never called
    module = load("cuda_on_cpu", [str(ROOT / "csrc/ops.cpp"), str(HERE / "kernels.cpp")], build_directory=folder,
                  extra_cflags=["-DWITH_CUDA", "'-DON_CUDA(tensor)=true'", "-fno-strict-aliasing", *flags],
                  extra_ldflags=["-Wl,-z,lazy", *(flag for flag in flags if "sanitize" in flag)],
                  extra_include_paths=[str(HERE)], with_cuda=False)
    return module, ctypes.CDLL(module.__file__)


def windows_h(library, *args):
    """Arguments: B, H, W, heads, d, M, then a strip, one of its tokens, a third and a head; result: see kernels.cpp."""
    answer = (ctypes.c_int64 * 12)()
    library.windows_h((ctypes.c_int64 * 6)(*args[:6]), *map(ctypes.c_int64, args[6:]), answer)
    return list(answer)


def empty_outputs(name, args):
    """What an operator writes to, of the shapes in ops.py."""
    if name == "window_partition":
        qkv, heads, M = args
        n, d = windows_of(qkv, M), qkv.shape[3] // 3 // heads
        return [qkv.new_empty(3, n, heads, M * M, d)]
    if name == "window_partition_backward":
        grad, H, W, M = args
        B = grad.shape[1] // (-(-H // M) * -(-W // M))
        return [grad.new_empty(B, H, W, 3 * grad.shape[2] * grad.shape[4])]
    if name == "window_merge_lim":
        return [args[1].new_empty(*args[1].shape[:3], args[1].shape[3] // 3)]
    grad, qkv, weight, heads, M = args
    dz = qkv.new_empty(windows_of(qkv, M), heads, M * M, grad.shape[3] // heads)
    return [dz, qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(grad.shape[3])]


def windows_of(qkv, M):
    B, H, W, _ = qkv.shape
    return B * -(-H // M) * -(-W // M)


def call(module, name, args):
    outputs = empty_outputs(name, args)
    getattr(module, name)(*args, *outputs)
    return outputs if len(outputs) > 1 else outputs[0]


def serve(folder, flags):
    """Answer requests (function name, its arguments, launch_with's arguments) with the result or the exception."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    module, library = build(folder, flags)
    torch.use_deterministic_algorithms(True)                       # fills torch.empty with NaN
    while True:
        try:
            name, args, launches = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        library.launch_with(*map(ctypes.c_int64, launches))
        try:
            answer = windows_h(library, *args) if name == "windows_h" else call(module, name, args)
        except RuntimeError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


class Process:
    def __init__(self, folder):
        self.log = open(folder / "log", "w+")
        names = [f"lib{name[0]}san.so" for name in ("address", "thread") if any(name in flag for flag in FLAGS)]
        preload = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                   for name in [*names, "libstdc++.so.6"] if names]          # sanitizers must be loaded before Python
        env = os.environ | ({"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"} if names else {})
        self.process = subprocess.Popen([sys.executable, __file__, "serve", folder, *FLAGS], env=env, stderr=self.log,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request):
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError):
            self.process.wait()
            pytest.fail("the process that runs the kernels died:\n" + self.end_of_log())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end_of_log(self):
        self.log.seek(0)
        return self.log.read()[-5000:]

    def __call__(self, name, *args, threads=64, blocks=ANY, failing=-1, seed=0):
        return self.ask((name, args, (threads, blocks, failing, seed)))


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    """cuda(operator, *args, ...) calls an operator in the other process.

    threads, blocks: upper limits per block and per grid; failing: index of the launch that fails; seed: determines the
    order in which blocks and threads run.
    """
    for program in (COMPILER, "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"the kernels cannot be built: there is no {program}")
    process = Process(tmp_path_factory.mktemp("cuda_on_cpu"))
    yield process
    process.process.stdin.close()
    assert process.process.wait() == 0, process.end_of_log()       # ThreadSanitizer only reports at exit


# ------------------------------------------------------------------------------------------------ plain PyTorch
def partition(qkv, heads, M):
    """(B, H, W, 3C) -> (3, B·windows, heads, M², d)"""
    B, H, W, C3 = qkv.shape
    padded = F.pad(qkv, (0, 0, 0, -W % M, 0, -H % M))
    h, w, d = padded.shape[1] // M, padded.shape[2] // M, C3 // 3 // heads
    return padded.reshape(B, h, M, w, M, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, M * M, d)


def merge_lim(z, qkv, weight, bias, M):
    """(B·windows, heads, M², d), (B, H, W, 3C) -> (B, H, W, C)"""
    B, H, W, C = *qkv.shape[:3], qkv.shape[3] // 3
    h, w = -(-H // M), -(-W // M)
    merged = z.reshape(B, h, w, z.shape[1], M, M, z.shape[3]).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, h * M, w * M, C)
    lim = F.conv2d(qkv[..., 2 * C:].permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=C)
    return merged[:, :H, :W] + lim.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------ cases
def choices():
    """A uniform random.choice; Hypothesis's own choices prefer small and repeated values."""
    return st.randoms(use_true_random=True).map(lambda random: random.choice)


launches = choices().map(lambda choose: dict(threads=32 if REAL_THREADS else choose([32, 48, 64, 256]),
                                             blocks=choose([1, 3, ANY]), seed=choose(range(100))))


def examples(n):
    return settings(max_examples=n // 10 if REAL_THREADS else n)


@st.composite
def cases(draw):
    """Arguments of the operators: map sizes divisible by the window or not, any memory layout and alignment."""
    choose = draw(choices())
    B, H, W, M = choose([0, 1, 1, 2, 2]), choose(range(1, 12)), choose(range(1, 12)), choose(range(1, 9))
    heads, d = choose([1, 2, 3]), choose([1, 2, 3, 4, 8, 8, 12, 16, 24, 33, 40])
    k, dtype = choose([1, 3, 3, 3, 5, 7]), choose(DTYPES)
    windows, C = B * -(-H // M) * -(-W // M), heads * d
    generator = torch.Generator().manual_seed(choose(range(1000)))

    def tensor(*shape, dtype=dtype):
        """16-byte aligned, or off by one element; dimensions may be reversed in memory."""
        order = list(range(len(shape)))[::choose([1, 1, 1, -1])]
        offset = choose([0] * 7 + [1])
        flat = torch.randn(offset + math.prod(shape), generator=generator).to(dtype)[offset:]
        return flat.view([shape[i] for i in order]).permute(order)

    def attention():
        """Contiguous, laid out as by PyTorch's fused attention, a slice of more channels, or transposed."""
        return choose([lambda: tensor(windows, heads, M * M, d),
                       lambda: tensor(windows, M * M, heads, d).transpose(1, 2),
                       lambda: tensor(windows, heads, M * M, d + 1)[..., :d],
                       lambda: tensor(windows, heads, d, M * M).transpose(2, 3)])()

    weights = choose([dtype, torch.promote_types(dtype, torch.float32)])        # float32 under autocast
    return dict(heads=heads, M=M, qkv=tensor(B, H, W, 3 * C), z=attention(), grad=tensor(B, H, W, C),
                weight=tensor(C, 1, k, k, dtype=weights), bias=tensor(C, dtype=weights),
                grad_windows=tensor(3, windows, heads, M * M, d))


def merge_args(case):
    return *(case[name] for name in ("z", "qkv", "weight", "bias")), case["M"]


def backward_args(case):
    return *(case[name] for name in ("grad", "qkv", "weight", "heads")), case["M"]


def close(got, exact):
    """Equal up to rounding in got's dtype, relative to the largest element; exact is float64."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs() / exact.abs().max().clamp_min(1) if exact.numel() else exact
    assert (error <= ROUNDING[got.dtype]).all(), f"off by {error.max()}"           # false for NaN


# ------------------------------------------------------------------------------------------------ tests
@examples(150)
@given(case=cases(), launch=launches)
def test_partition_forward_and_backward_are_bitwise_exact(cuda, case, launch):
    qkv, heads, M, grad = case["qkv"], case["heads"], case["M"], case["grad_windows"]
    assert torch.equal(cuda("window_partition", qkv, heads, M, **launch), partition(qkv, heads, M))
    leaf = qkv.double().requires_grad_()
    partition(leaf, heads, M).backward(grad.double())
    got = cuda("window_partition_backward", grad, *qkv.shape[1:3], M, **launch)
    assert got.dtype == grad.dtype
    assert torch.equal(got.double(), leaf.grad)


@examples(150)
@given(case=cases(), launch=launches)
def test_merge_lim_against_its_definition_in_float64(cuda, case, launch):
    *tensors, M = merge_args(case)
    got = cuda("window_merge_lim", *tensors, M, **launch)
    assert got.dtype == case["qkv"].dtype
    close(got, merge_lim(*(t.double() for t in tensors), M))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_every_stride_of_z_is_checked_before_wide_loads(cuda, broken):
    """Strides between windows, heads and tokens, one of them odd: the sanitizer would stop at a load of 16 bytes."""
    strides = [1024, 256, 16, 1]
    strides[broken] += 1
    z = torch.randn(2048 + 8).as_strided((2, 4, 16, 8), strides)
    tensors = z, torch.randn(1, 4, 8, 96), torch.randn(32, 1, 3, 3), torch.randn(32)
    close(cuda("window_merge_lim", *tensors, 4), merge_lim(*(t.double() for t in tensors), 4))


@examples(100)
@given(case=cases(), launch=launches)
def test_merge_lim_backward_against_autograd_in_float64(cuda, case, launch):
    *tensors, M = merge_args(case)
    exact = [t.double().requires_grad_() for t in tensors]
    merge_lim(*exact, M).backward(case["grad"].double())
    for got, leaf, like in zip(cuda("window_merge_lim_backward", *backward_args(case), **launch), exact, tensors):
        assert got.dtype == like.dtype
        close(got, leaf.grad)


@examples(40)
@given(case=cases(), launch=launches, other=launches)
def test_results_do_not_depend_on_the_order_of_threads_or_blocks(cuda, case, launch, other):
    """Nor on the number of blocks; the number of threads per block does affect the order of summation."""
    other = other | {"threads": launch["threads"]}
    for name, args in (("window_merge_lim", merge_args(case)), ("window_merge_lim_backward", backward_args(case))):
        first, second = (cuda(name, *args, **settings) for settings in (launch, other))
        for a, b in [(first, second)] if name == "window_merge_lim" else zip(first, second):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name, launches", [("window_partition", 1), ("window_partition_backward", 1),
                                            ("window_merge_lim", 1), ("window_merge_lim_backward", 2)])
def test_every_failed_launch_raises(cuda, name, launches):
    qkv, z, weight = torch.randn(1, 5, 9, 24), torch.randn(2, 2, 49, 4), torch.randn(8, 1, 3, 3)
    args = {"window_partition": (qkv, 2, 7), "window_partition_backward": (torch.stack([z, z, z]), 5, 9, 7),
            "window_merge_lim": (z, qkv, weight, torch.randn(8), 7),
            "window_merge_lim_backward": (torch.randn(1, 5, 9, 8), qkv, weight, 2, 7)}[name]
    for failing in range(launches):
        with pytest.raises(RuntimeError, match="CUDA error"):
            cuda(name, *args, failing=failing)
    cuda(name, *args, failing=launches)                            # the one after the last: none was missed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_match_pytorch(cuda, dtype):
    """All 16-bit numbers to float32, and float32 numbers of all magnitudes, including ties, to 16 bits."""
    def merge(z, bias):
        qkv, weight = z.new_zeros(1, 1, 1, 3 * len(z)), bias.new_zeros(len(z), 1, 1, 1)
        return cuda("window_merge_lim", z.view(1, 1, 1, -1), qkv, weight, bias, 1, threads=256).flatten()

    every = torch.arange(2 ** 16).to(torch.int16).view(dtype)
    halfway = every.float().add(torch.nextafter(every, every.new_tensor(math.inf)).float()).div(2)
    anything = torch.randint(-2 ** 31, 2 ** 31, (2 ** 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    pairs = [(merge(every, torch.zeros(2 ** 16)), every)]
    for x in (halfway, halfway.nextafter(every.float()), anything):
        pairs.append((merge(torch.zeros_like(every), x), x.to(dtype)))
    for got, exact in pairs:
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got.nan_to_num(), exact.nan_to_num())


@examples(100)
@given(data=st.data())
def test_indices_beyond_32_bits(cuda, data):
    """The index arithmetic of windows.h against Python's integers, for maps that would not fit in memory."""
    def number(*bounds):
        return data.draw(st.integers(*bounds))

    B, H, W, M = number(1, 64), number(1, 2 ** 18), number(1, 2 ** 18), number(1, 999)
    h, w, heads, d = -(-H // M), -(-W // M), number(1, 32), number(1, 64)
    b, wy, wx, third, head = number(0, B - 1), number(0, h - 1), number(0, w - 1), number(0, 2), number(0, heads - 1)
    row, i = number(0, M - 1), number(0, M - 1)
    y, x, window = wy * M + row, wx * M, (b * h + wy) * w + wx
    strip = (b * h * M + y) * w + wx                               # strips are numbered row by row
    group = sum([third * B * h * w * heads * M * M, window * heads * M * M, head * M * M, row * M + i])
    merged = sum([window * M * M * heads * d, (row * M + i) * heads * d, head * d])        # (windows, M², heads, d)
    assert cuda("windows_h", B, H, W, heads, d, M, strip, i, third, head) == [
        B * h * w, B * h * w * M, b, y, x, window, row * M, min(M, W - x) if y < H else 0,
        b * H * W + y * W + x + i, group, merged, (b * h * M + wy * M) * w + wx]


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3:])
    else:
        module, _ = build(tempfile.mkdtemp(), sys.argv[1:])
        qkv, z = torch.randn(1, 5, 9, 24), torch.randn(2, 2, 49, 4)
        print(call(module, "window_merge_lim", (z, qkv, torch.randn(8, 1, 3, 3), torch.randn(8), 7)))
