"""The operators of scalablevit_kernels against float64 and scalablevit.py, and how they are built.

Skipped if the extension is not built.  CUDA tests need a GPU; test_cuda_on_cpu.py runs the CUDA kernels
without one.
"""
import math
import os
import pathlib
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch.autograd import forward_ad

from helpers import (DTYPES, OPERATORS, arguments, attend_by_hand, check_operators, close, operator_case,
                     operator_cases)
from scalablevit import IWSA

kernels = pytest.importorskip("scalablevit_kernels")
pytestmark = pytest.mark.skipif(not kernels.devices, reason="the extension is not built")
ops = torch.ops.scalablevit
DEVICES = [device for device in kernels.devices if device == "cpu" or torch.cuda.is_available()]
on_devices = pytest.mark.parametrize("device", DEVICES)
needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no CUDA build")
for_operators = pytest.mark.parametrize("name", OPERATORS)
for_dtypes = pytest.mark.parametrize("dtype", DTYPES)
some = settings(max_examples=50)


def run(name, case, device="cpu"):
    """The outputs of an operator on a device, as a tuple."""
    args = (x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments(name, case))
    outputs = getattr(ops, name)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def sizes(device="cpu", **changes):
    """Windows cut off by the border, for examples; `iwsa` is for the CPU only."""
    case = operator_case(**dict(B=2, H=8, W=5, heads=2, d=4, M=3) | changes)
    return case, [name for name in OPERATORS if device == "cpu" or "iwsa" not in name]


@on_devices
@some
@given(case=operator_cases())
def test_partition_and_merge(device, case):
    check_operators(lambda name: run(name, case, device), case)


@some
@given(case=operator_cases(), sharpness=st.sampled_from([1, 1, 30]))
@example(case=operator_case(2, 25, 19, 2, 12, 23), sharpness=1)
@example(case=operator_case(2, 25, 19, 2, 12, 23, dtype=torch.float64), sharpness=1)
def test_iwsa(case, sharpness):
    """Outputs and gradients against attention among the real tokens of each window, in float64.

    Sharp scores: a softmax that is nearly one-hot, and would overflow if the maximum were not subtracted.
    Large windows: more queries than are processed at a time, and more keys than fit in registers.
    """
    q = torch.arange(case["qkv"].shape[3]) < case["grad"].shape[3]
    case["qkv"] = case["qkv"] * torch.where(q, sharpness, 1).to(case["qkv"].dtype)
    heads, M = case["heads"], case["M"]
    own = [case[key].detach().clone().requires_grad_() for key in ("qkv", "weight", "bias")]
    qkv, weight, bias = (t.detach().double().requires_grad_() for t in own)
    exact, got = attend_by_hand(qkv, heads, M, interactive=(weight, bias)), ops.iwsa(*own, heads, M)
    assert got.dtype == case["qkv"].dtype
    gradients = torch.autograd.grad(got, own, case["grad"])
    expected = torch.autograd.grad(exact, (qkv, weight, bias), case["grad"].double())
    for a, b in zip((got, *gradients), (exact, *expected)):
        close(a.detach(), b.detach(), factor=5)


@for_dtypes
@pytest.mark.parametrize("channel", [1, 9])
def test_in_iwsa_a_nan_stays_in_its_window(dtype, channel):
    """In a query or a value.  The buffers of the 3 x 3 window are reused for one of 3 tokens."""
    case, _ = sizes(B=1, H=3, W=4, heads=1, k=1, dtype=dtype)
    case["weight"].zero_()
    case["qkv"][0, 1, 0, channel] = math.nan
    for name in ("iwsa", "iwsa_backward"):
        nan = run(name, case)[0].isnan().any(-1)[0]
        assert nan[1, 0]
        assert not nan[:, 3].any()


@for_dtypes
def test_huge_scores_select_one_key(dtype):
    """The softmax of widely spaced scores is one-hot, however large they are."""
    size = {torch.float16: 30, torch.bfloat16: 1e4}.get(dtype, 1e15)
    for _ in range(30):
        order = torch.randperm(17)
        qkv = torch.zeros(1, 1, 17, 51, dtype=dtype)                # one window of 17 tokens, d = 17
        qkv[..., 0] = size
        qkv[..., 17] = size * (order / 8 - 1)
        qkv[0, 0, :, 34:] = torch.eye(17)                           # V: one-hot index of the key
        out = ops.iwsa(qkv, qkv.new_zeros(17, 1, 1, 1), qkv.new_zeros(17), 1, 17)
        assert torch.equal(out[0, 0], F.one_hot(order.argmax(), 17).to(dtype).expand(17, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_differ_in_the_last_bit(dtype):
    """Multiplied by the scale they may be equal; even so, the larger one must be subtracted from both."""
    for d in range(20, 40):
        for x in torch.logspace(8, 14, 20, dtype=dtype):
            qkv = torch.zeros(1, 1, 2, 3 * d, dtype=dtype)
            qkv[..., 0] = 1
            qkv[0, 0, :, d] = torch.stack([x, torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))])
            qkv[0, 0, :, 2 * d:2 * d + 2] = torch.eye(2)
            a, b = ops.iwsa(qkv, torch.zeros(d, 1, 1, 1, dtype=dtype), qkv.new_zeros(d), 1, 2)[0, 0, 0, :2]
            assert 0 <= a <= b
            assert abs(a + b - 1) < 1e-5


@on_devices
@for_dtypes
def test_nan_and_infinity_are_preserved(device, dtype):
    def merge(z, bias):
        qkv, weight = z.new_zeros(1, 1, 1, 12), bias.new_zeros(4, 1, 3, 3)
        return ops.window_merge_lim(z.view(1, 1, 1, 4), qkv, weight, bias, 1).flatten()

    z = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max], dtype=dtype, device=device)
    torch.testing.assert_close(merge(z, z.new_zeros(4)), z, rtol=0, atol=0, equal_nan=True)
    if dtype != torch.float64:                                      # a NaN whose bits, rounded up, are zero
        bias = torch.full((4,), 0x7fffffff, dtype=torch.int32, device=device).view(torch.float32)
        assert merge(z, bias).isnan().all()


@on_devices
def test_results_are_bitwise_equal_for_any_number_of_threads(device):
    case, names = sizes(device, B=3, H=23, W=29, d=20, M=7)
    threads, expected = torch.get_num_threads(), [run(name, case, device) for name in names]
    try:
        for n in (2, 3, 7, 1):
            torch.set_num_threads(n)
            for name, outputs in zip(names, expected):
                assert all(map(torch.equal, run(name, case, device), outputs))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory work on Linux")
def test_an_empty_batch_needs_no_memory():
    """However large the window is: its buffers would take 51 GB."""
    M = 2 ** 15 - 1
    case = dict(qkv=torch.empty(0, M, M, 3), grad=torch.empty(0, M, M, 1), weight=torch.randn(1, 1, 3, 3),
                bias=torch.randn(1), heads=1, M=M)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 30, hard))
    try:
        out, = run("iwsa", case)
        gradients = run("iwsa_backward", case)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    for t, key in zip((out, *gradients), ("grad", "qkv", "weight", "bias")):
        assert t.shape == case[key].shape
    assert not any(t.any() for t in gradients)


@needs_cuda
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2 ** 30:
        pytest.skip("needs 20 GiB of GPU memory")
    qkv = torch.empty(1, 4, 2 ** 21 + 1, 3 * 96, dtype=torch.bfloat16, device="cuda").uniform_()
    windows = ops.window_partition(qkv, 3, 4)
    assert torch.equal(ops.window_partition_backward(windows, *qkv.shape[1:3], 4), qkv)


@on_devices
def test_gradcheck(device):
    case, names = sizes(device, H=4, d=2, dtype=torch.float64)
    for name in names:
        if "backward" in name:
            continue
        inputs = [t.to(device).requires_grad_() if isinstance(t, torch.Tensor) else t
                  for t in arguments(name, case)]
        assert torch.autograd.gradcheck(getattr(ops, name), inputs)
        out = getattr(ops, name)(*inputs)
        first, = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="unfuse"):
            first.sum().backward()


@on_devices
@for_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, name, dtype):
    case, names = sizes(device, dtype=dtype)
    if name not in names:
        pytest.skip("CPU only")
    leaf = "backward" not in name                                   # the others are not differentiable
    args = [t.to(device).requires_grad_(leaf) if isinstance(t, torch.Tensor) else t
            for t in arguments(name, case)]
    torch.library.opcheck(getattr(ops, name), args)


@for_operators
def test_forward_mode_and_transforms_raise_and_name_unfuse(name):
    """Also forward mode under no_grad, where PyTorch by itself would drop the tangents without a word."""
    x, *others = arguments(name, sizes()[0])

    def call(t):
        outputs = getattr(ops, name)(t, *others)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    with forward_ad.dual_level():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="unfuse"):
                call(forward_ad.make_dual(x, torch.ones_like(x)))
    for transform in ("vmap", "jacrev", "jacfwd", "hessian"):
        with pytest.raises(RuntimeError, match="unfuse"):
            getattr(torch.func, transform)(call)(x)
    with pytest.raises(RuntimeError, match="unfuse"):
        torch.func.grad(lambda t: call(t).sum())(x)
    call(x)                                                         # by itself it works
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        call(x)


def bad_inputs(case):
    """(operator, words of its message, changes of the case)"""
    for name, (keys, _) in OPERATORS.items():
        for key in keys.split():
            x = case[key]
            if isinstance(x, int):
                words = {"heads": "heads", "M": "window", "H": "H and W in 1", "W": "H and W in 1"}[key]
                for wrong in (0, -1, 2 ** 15, 2 ** 40):
                    yield name, words, {key: wrong}
                continue
            yield name, "shape", {key: x[0]}
            yield name, "float32", {key: x.int()}
            if key != "qkv":
                yield name, "shape", {key: x[:-1]}
            if key not in ("qkv", "windows"):
                yield name, "dtype", {key: x.half()}
            if key == "weight":
                yield name, "odd", {key: torch.ones(8, 1, 2, 2)}
                yield name, "shape", {key: torch.ones(8, 1, 3, 5)}
    for words, *shape in ("channels", 2, 6, 6, 23), ("channels", 2, 6, 6, 0), ("at least 1", 2, 0, 6, 24):
        yield "window_partition", words, dict(qkv=torch.ones(shape))
    for shape in (3, 7, 2, 9, 4), (3, 8, 2, 8, 4):
        yield "window_partition_backward", "shape", dict(windows=torch.ones(shape))
    huge = dict(windows=torch.ones(3, 0, 2, 9, 4), H=3 * 2 ** 32, W=3 * 2 ** 32)
    yield "window_partition_backward", "2.31", huge
    yield "window_merge_lim", "shape", dict(M=2)
    yield "window_merge_lim_backward", "grad", dict(grad=torch.ones(2, 6, 6, 4))


@on_devices
def test_bad_input_raises_and_says_what_is_accepted(device):
    """From the kernels and from the fake implementations."""
    case, names = sizes(device, H=6, W=6)
    for name, words, changes in bad_inputs(case):
        for place in (device, "meta") if name in names else ("meta",):
            with pytest.raises(RuntimeError, match=words):
                run(name, case | changes, place)
    with pytest.raises(RuntimeError, match="be on"):                # tensors on two devices
        ops.window_merge_lim(case["z"], case["qkv"], case["weight"], case["bias"].to("meta"), 3)


@needs_cuda
def test_cuda_graph():
    model = kernels.fuse(IWSA(32, 2, window=4).cuda()).eval()
    x, graph = torch.randn(2, 9, 9, 32, device="cuda"), torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = model(x)
        with torch.cuda.graph(graph):                               # on another stream
            out = model(x)
        graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["PyTorch", "no-such-compiler", "compiling failed"])
def test_without_pytorch_or_a_working_compiler_the_python_part_is_installed(tmp_path, reason):
    """And a note says why.  The sources are copied, as an earlier build may have left files beside them."""
    for name in ("setup.py", "pyproject.toml", "README.md", "scalablevit.py", "csrc"):
        (tmp_path / name).symlink_to(pathlib.Path(__file__).parents[1] / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/torch.py").write_text("raise ImportError")
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    broken = str(tmp_path / "broken")
    env = {"PyTorch": {"PYTHONPATH": tmp_path / "empty"}, "no-such-compiler": {"CXX": "no-such-compiler"},
           "compiling failed": {"CXX": broken, "CC": broken}}[reason]
    got = subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build"],
                         cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    line, = [line for line in got.stderr.splitlines() if line.startswith("scalablevit:")]
    assert reason in line
    use = "import scalablevit, scalablevit_kernels as k; print(k.devices); k.fuse(scalablevit.IWSA(8, 2))"
    got = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True,
                         cwd=next(tmp_path.glob("build/lib*")))
    devices, note = got.stdout.splitlines()
    assert devices == "()"
    assert note.startswith("fused without the compiled kernels: ")
    assert reason in note
    assert "to build them: pip install" in note
