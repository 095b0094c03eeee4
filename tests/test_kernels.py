"""The operators of scalablevit_kernels against float64 and scalablevit.py, and how they are built.

Skipped if the extension is not built.  CUDA tests need a GPU; test_cuda_on_cpu.py runs the CUDA kernels without one.
What `fuse` does with the operators is tested in test_fuse.py.
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import scalablevit
from helpers import from_windows, to_windows
from scalablevit import IWSA

ROOT = pathlib.Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
some = settings(max_examples=50, deadline=None)

try:
    from scalablevit_kernels import devices as HAVE
    from scalablevit_kernels import fuse
    ops = torch.ops.scalablevit
except ModuleNotFoundError:
    HAVE = ()
needs_kernels = pytest.mark.skipif(not HAVE, reason="the extension is not built")
needs_cuda = pytest.mark.skipif("cuda" not in HAVE or not torch.cuda.is_available(), reason="no GPU, or no CUDA build")
on_devices = pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_kernels),
                                                pytest.param("cuda", marks=needs_cuda)])


# ------------------------------------------------------------------------------------------------ references and cases
def convolution(qkv, weight, bias):
    """F(V) with conv2d."""
    v = qkv.chunk(3, dim=-1)[2].permute(0, 3, 1, 2)
    return F.conv2d(v, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]).permute(0, 2, 3, 1)


def windows_alone(qkv, weight, bias, heads, M):
    """IWSA between its linear layers: attention among the real tokens of each window, plus F(V)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(3)                           # (B, H, W, heads, d) each
    rows = []
    for y in range(0, qkv.shape[1], M):
        row = []
        for x in range(0, qkv.shape[2], M):
            window = [t[:, y:y + M, x:x + M] for t in (q, k, v)]
            scores = torch.einsum("byxhd,bmnhd->bhyxmn", *window[:2]) / math.sqrt(q.shape[-1])
            row.append(torch.einsum("bhyxmn,bmnhd->byxhd", scores.flatten(4).softmax(-1).view_as(scores), window[2]))
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1).flatten(3) + convolution(qkv, weight, bias)


@st.composite
def cases(draw):
    """Map sizes divisible by M or not, maps smaller than a window, tensors in any memory layout."""
    B, H, W = draw(st.integers(0, 3)), draw(st.integers(1, 17)), draw(st.integers(1, 17))
    heads, d = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 12, 16, 20, 24, 32, 33]))
    M, k = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 5, 7]))
    dtype, C = draw(st.sampled_from(DTYPES)), heads * d
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def tensor(*shape, dtype=dtype):
        order = draw(st.permutations(range(len(shape))))           # order of dimensions in memory
        step = draw(st.sampled_from([1, 1, 2]))                    # 2: every second element
        full = torch.randn([shape[i] for i in order[:-1]] + [shape[order[-1]] * step], generator=generator).to(dtype)
        return full[..., ::step].permute([order.index(i) for i in range(len(shape))])

    windows = B * math.ceil(H / M) * math.ceil(W / M)
    parameters = draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)]))    # autocast: float32
    return dict(heads=heads, M=M, qkv=tensor(B, H, W, 3 * C), z=tensor(windows, heads, M * M, d),
                weight=tensor(C, 1, k, k, dtype=parameters), bias=tensor(C, dtype=parameters),
                grad_windows=tensor(3, windows, heads, M * M, d), grad=tensor(B, H, W, C))


def close(got, exact):
    """Equal up to rounding in got's dtype, relative to the largest element; exact is float64."""
    assert got.shape == exact.shape
    if exact.numel():
        error, scale = (got.cpu().double() - exact).abs().max(), exact.abs().max().clamp_min(1)
        assert error <= ROUNDING[got.dtype] * scale


def check(operator, reference, inputs, grad, device):
    """Compare outputs and gradients of operator(*inputs) with the reference in float64."""
    exact = [t.double().requires_grad_() for t in inputs]
    own = [t.detach().to(device, copy=True).requires_grad_() for t in inputs]
    out, got = reference(*exact), operator(*own)
    assert got.dtype == inputs[0].dtype
    close(got.detach(), out.detach())
    out.backward(grad.double())
    got.backward(grad.to(device))
    for a, b in zip(own, exact):
        assert a.grad.dtype == a.dtype
        close(a.grad, b.grad)


# ------------------------------------------------------------------------------------------------ operators
@on_devices
@some
@given(case=cases())
def test_partition_forward_and_backward_are_bitwise_exact(device, case):
    qkv, heads, M, grad = case["qkv"], case["heads"], case["M"], case["grad_windows"]
    assert torch.equal(ops.window_partition(qkv.to(device), heads, M).cpu(), to_windows(qkv, heads, M))
    leaf = qkv.double().requires_grad_()
    to_windows(leaf, heads, M).backward(grad.double())
    got = ops.window_partition_backward(grad.to(device), *qkv.shape[1:3], M)
    assert got.dtype == grad.dtype
    assert torch.equal(got.cpu().double(), leaf.grad)


@on_devices
@some
@given(case=cases())
def test_merge_lim_against_its_definition(device, case):
    H, W = case["qkv"].shape[1:3]
    check(lambda *t: ops.window_merge_lim(*t, case["M"]),
          lambda z, *t: from_windows(z, H, W, case["M"]) + convolution(*t),
          [case[name] for name in ("z", "qkv", "weight", "bias")], case["grad"], device)


@needs_kernels
@some
@given(case=cases(), sharpness=st.sampled_from([1, 1, 30]))
def test_iwsa_against_attention_in_each_window(case, sharpness):
    """Sharp scores make the softmax nearly one-hot, and would overflow if the maximum were not subtracted."""
    channels, heads, M = case["qkv"].shape[-1], case["heads"], case["M"]
    case["qkv"] = case["qkv"] * torch.where(torch.arange(channels) < channels // 3, sharpness, 1).to(case["qkv"].dtype)
    check(lambda *t: ops.iwsa(*t, heads, M), lambda *t: windows_alone(*t, heads, M),
          [case[name] for name in ("qkv", "weight", "bias")], case["grad"], "cpu")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iwsa_with_large_windows(dtype):
    """A window of 23 x 19 tokens: more queries than are processed at a time, and more keys than fit in registers."""
    inputs = [torch.randn(*shape, dtype=dtype) for shape in ((2, 25, 19, 72), (24, 1, 3, 3), (24,))]
    check(lambda *t: ops.iwsa(*t, 2, 23), lambda *t: windows_alone(*t, 2, 23), inputs,
          torch.randn(2, 25, 19, 24, dtype=dtype), "cpu")


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [1, 9])
def test_in_iwsa_a_nan_stays_in_its_window(dtype, channel):
    """In a query or a value, forward and backward.  The buffers of the 3 x 3 window are reused for one of 3 tokens."""
    qkv, weight, bias = torch.randn(1, 3, 4, 12).to(dtype), torch.zeros(4, 1, 1, 1).to(dtype), torch.zeros(4).to(dtype)
    qkv[0, 1, 0, channel] = math.nan
    dqkv, _, _ = ops.iwsa_backward(torch.randn(1, 3, 4, 4).to(dtype), qkv, weight, 1, 3)
    for result in ops.iwsa(qkv, weight, bias, 1, 3), dqkv:
        nan = result.isnan().any(-1)[0]
        assert nan[1, 0]
        assert not nan[:, 3].any()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_select_one_key(dtype):
    """The softmax of widely spaced scores is one-hot, however large they are."""
    size = {torch.float16: 30, torch.bfloat16: 1e4}.get(dtype, 1e15)
    for seed in range(30):
        torch.manual_seed(seed)
        qkv = torch.zeros(1, 1, 17, 51)                             # one window of 17 tokens, d = 17
        qkv[..., 0], qkv[..., 17] = size, torch.randn(17) * size
        qkv[0, 0, :, 34:] = torch.eye(17)                           # V: one-hot index of the key
        largest = qkv[0, 0, :, 17].topk(2)
        if largest.values.diff().abs() < 0.1 * size:
            continue                                                # too close: rounding would decide
        out = ops.iwsa(qkv.to(dtype), torch.zeros(17, 1, 1, 1).to(dtype), torch.zeros(17).to(dtype), 1, 17)
        assert torch.equal(out[0, 0], F.one_hot(largest.indices[0], 17).to(dtype).expand(17, -1))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_differ_in_the_last_bit(dtype):
    """Multiplied by the scale they may be equal; even so, the larger one must be subtracted from both."""
    for d in range(20, 40):
        for x in torch.logspace(8, 14, 20, dtype=dtype):
            qkv = torch.zeros(1, 1, 2, 3 * d, dtype=dtype)
            qkv[..., 0] = 1
            qkv[0, 0, :, d] = torch.stack([x, torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))])
            qkv[0, 0, :, 2 * d:2 * d + 2] = torch.eye(2)
            a, b = ops.iwsa(qkv, torch.zeros(d, 1, 1, 1, dtype=dtype), torch.zeros(d, dtype=dtype), 1, 2)[0, 0, 0, :2]
            assert 0 <= a <= b
            assert abs(a + b - 1) < 1e-5


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_preserved(device, dtype):
    def merge(z, bias):
        qkv, weight = z.new_zeros(1, 1, 1, 12), bias.new_zeros(4, 1, 3, 3)
        return ops.window_merge_lim(z.view(1, 1, 1, 4), qkv, weight, bias, 1).flatten()

    z = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max], dtype=dtype, device=device)
    got = merge(z, z.new_zeros(4))
    assert torch.equal(got.nan_to_num(7.0), z.nan_to_num(7.0))
    assert got[0].isnan()
    if dtype != torch.float64:                                     # a NaN whose bits, rounded up, would be zero
        bias = torch.full((4,), 0x7fffffff, dtype=torch.int32, device=device).view(torch.float32)
        assert merge(z, bias).isnan().all()


# ------------------------------------------------------------------------------------------------ PyTorch integration
def leaf(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


@on_devices
def test_gradcheck(device):
    qkv, z, weight, bias = (leaf(*s, device=device) for s in ((2, 4, 5, 12), (8, 2, 9, 2), (4, 1, 3, 3), (4,)))
    calls = {lambda qkv: ops.window_partition(qkv, 2, 3): [qkv],
             lambda qkv, z, *t: ops.window_merge_lim(z, qkv, *t, 3): [qkv, z, weight, bias]}
    if device == "cpu":
        calls[lambda *t: ops.iwsa(*t, 2, 3)] = [qkv, weight, bias]
    for call, inputs in calls.items():
        assert torch.autograd.gradcheck(call, inputs)
        first, = torch.autograd.grad(call(*inputs).square().sum(), qkv, create_graph=True)
        with pytest.raises(NotImplementedError, match="unfuse"):
            first.sum().backward()


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    qkv, z, weight, bias = (leaf(*s, dtype=dtype, device=device)
                            for s in ((2, 8, 5, 24), (2 * 3 * 2, 2, 9, 4), (8, 1, 3, 3), (8,)))
    torch.library.opcheck(ops.window_partition, (qkv, 2, 3))
    windows = torch.randn(3, 12, 2, 9, 4, dtype=dtype, device=device)
    torch.library.opcheck(ops.window_partition_backward, (windows, 8, 5, 3))
    torch.library.opcheck(ops.window_merge_lim, (z, qkv, weight, bias, 3))
    inputs = [t.detach() for t in (torch.randn_like(qkv[..., :8]), qkv, weight)]       # not differentiable
    torch.library.opcheck(ops.window_merge_lim_backward, (*inputs, 2, 3))
    if device == "cpu":
        torch.library.opcheck(ops.iwsa, (qkv, weight, bias, 2, 3))
        torch.library.opcheck(ops.iwsa_backward, (*inputs, 2, 3))


def calls():
    """For each operator, a function of one tensor, and an argument for it."""
    qkv, z, grad = torch.randn(1, 4, 4, 12), torch.randn(4, 2, 4, 2), torch.randn(1, 4, 4, 4)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    return {
        "window_partition": (lambda t: ops.window_partition(t, 2, 2), qkv),
        "window_partition_backward": (lambda t: ops.window_partition_backward(t, 4, 4, 2), torch.stack([z, z, z])),
        "window_merge_lim": (lambda t: ops.window_merge_lim(t, qkv, weight, bias, 2), z),
        "window_merge_lim_backward": (lambda t: ops.window_merge_lim_backward(t, qkv, weight, 2, 2)[0], grad),
        "iwsa": (lambda t: ops.iwsa(t, weight, bias, 2, 2), qkv),
        "iwsa_backward": (lambda t: ops.iwsa_backward(t, qkv, weight, 2, 2)[0], grad),
    }


@needs_kernels
@pytest.mark.parametrize("name", calls())
def test_forward_mode_and_transforms_raise_and_name_unfuse(name):
    """Also forward mode under no_grad, where PyTorch by itself would drop the tangents without a word."""
    call, x = calls()[name]
    with forward_ad.dual_level():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="unfuse"):
                call(forward_ad.make_dual(x, torch.ones_like(x)))
    for transformed in (torch.func.vmap(call), torch.func.grad(lambda t: call(t).sum()), torch.func.jacrev(call),
                        torch.func.jacfwd(call), torch.func.hessian(call)):
        with pytest.raises(RuntimeError, match="unfuse"):
            transformed(x)
    call(x)                                                         # by itself it works


@needs_kernels
@pytest.mark.parametrize("name", calls())
def test_a_freed_storage_raises(name):
    call, x = calls()[name]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        call(x)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory work on Linux")
def test_an_empty_batch_needs_no_memory():
    """However large the window is: its buffers would take 51 GB."""
    M = 2 ** 15 - 1
    qkv, grad, weight = torch.empty(0, M, M, 3), torch.empty(0, M, M, 1), torch.randn(1, 1, 3, 3)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 30, hard))
    try:
        assert ops.iwsa(qkv, weight, torch.randn(1), 1, M).shape == (0, M, M, 1)
        dqkv, dweight, dbias = ops.iwsa_backward(grad, qkv, weight, 1, M)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert dqkv.shape == qkv.shape
    assert dweight.eq(0).all()
    assert dbias.eq(0).all()


@on_devices
def test_results_are_bitwise_equal_for_any_number_of_threads(device):
    qkv, weight = torch.randn(3, 23, 29, 3 * 40, device=device), torch.randn(40, 1, 3, 3, device=device)
    grad, threads, seen = torch.randn(3, 23, 29, 40, device=device), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            z = ops.window_partition(qkv, 2, 7)[0]
            seen.append((ops.window_merge_lim(z, qkv, weight, weight[:, 0, 0, 0], 7),
                         *ops.window_merge_lim_backward(grad, qkv, weight, 2, 7)))
            if device == "cpu":
                seen[-1] += ops.iwsa(qkv, weight, weight[:, 0, 0, 0], 2, 7), *ops.iwsa_backward(grad, qkv, weight, 2, 7)
    finally:
        torch.set_num_threads(threads)
    for results in seen[1:]:
        assert all(map(torch.equal, results, seen[0]))


@needs_cuda
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2 ** 30:
        pytest.skip("needs 20 GiB of GPU memory")
    qkv = torch.randint(-99, 99, (1, 4, 2 ** 21 + 1, 3 * 96), dtype=torch.int8, device="cuda").to(torch.bfloat16)
    assert qkv.numel() > 2 ** 31
    windows = ops.window_partition(qkv, 3, 4)
    assert torch.equal(ops.window_partition_backward(windows, *qkv.shape[1:3], 4), qkv)


def bad_inputs():
    qkv, z, weight, bias = torch.randn(2, 6, 6, 24), torch.randn(8, 2, 9, 4), torch.randn(8, 1, 3, 3), torch.randn(8)
    partition, merge, grad = "window_partition", "window_merge_lim", torch.randn(2, 6, 6, 8)
    yield from [
        ("shape", partition, qkv[0], 2, 3),
        ("channels", partition, qkv[..., :23], 2, 3),
        ("channels", partition, qkv, 3, 3),
        ("channels", partition, qkv, 0, 3),
        ("channels", partition, qkv, -1, 3),
        ("channels", partition, qkv[..., :0], 2, 3),
        ("window", partition, qkv, 2, 0),
        ("window", partition, qkv, 2, -3),
        ("window", partition, qkv, 2, 2 ** 40),
        ("at least 1", partition, qkv[:, :0], 2, 3),
        ("float32", partition, qkv.int(), 2, 3),
        ("shape", partition + "_backward", z, 6, 6, 3),
        ("shape", partition + "_backward", torch.randn(3, 7, 2, 9, 4), 6, 6, 3),
        ("shape", partition + "_backward", torch.randn(3, 8, 2, 8, 4), 6, 6, 3),
        ("H and W in 1", partition + "_backward", torch.randn(3, 8, 2, 9, 4), 0, 6, 3),
        ("at least 1", partition + "_backward", torch.randn(3, 8, 2, 9, 4), 6, 6, 0),
        ("2.31", partition + "_backward", torch.randn(3, 0, 2, 9, 4), 3 * 2 ** 32, 3 * 2 ** 32, 3),
        ("shape", merge, z[0], qkv, weight, bias, 3),
        ("shape", merge, z[:7], qkv, weight, bias, 3),
        ("shape", merge, z, qkv, weight, bias, 2),
        ("dtype", merge, z.double(), qkv, weight, bias, 3),
        ("window", merge, z, qkv, weight, bias, 0),
        ("grad", merge + "_backward", torch.randn(2, 6, 6, 4), qkv, weight, 2, 3),
    ]
    for op, first, last in (merge, (z, qkv), (3,)), ("iwsa", (qkv,), (2, 3)):
        yield from [
            ("dtype", op, *first, weight, bias.double(), *last),
            ("dtype", op, *first, weight.double(), bias.double(), *last),
            ("dtype", op, *first, weight.bfloat16(), bias.bfloat16(), *last),
            ("odd", op, *first, torch.randn(8, 1, 2, 2), bias, *last),
            ("shape", op, *first, torch.randn(8, 1, 3, 5), bias, *last),
            ("shape", op, *first, weight[:4], bias, *last),
            ("bias", op, *first, weight, bias[:4], *last),
        ]
        yield "dtype", op + "_backward", grad.half(), qkv, weight, 2, 3
        yield "odd", op + "_backward", grad, qkv, torch.randn(8, 1, 4, 4), 2, 3


@on_devices
@pytest.mark.parametrize("match, op, args", [(match, op, args) for match, op, *args in bad_inputs()])
def test_bad_input_raises_and_says_what_is_accepted(device, match, op, args):
    """From the kernels and from the fake implementations."""
    if device == "cuda" and op.startswith("iwsa"):
        pytest.skip("CPU only")
    for place in device, "meta":
        with pytest.raises(RuntimeError, match=match):
            getattr(ops, op)(*(a.to(place) if isinstance(a, torch.Tensor) else a for a in args))


@needs_kernels
def test_tensors_on_two_devices_raise():
    qkv, weight, bias = torch.randn(2, 6, 6, 24), torch.randn(8, 1, 3, 3), torch.randn(8)
    with pytest.raises(RuntimeError, match="be on"):
        ops.iwsa(qkv, weight, bias.to("meta"), 2, 3)


@needs_cuda
def test_cuda_graph():
    model, x = fuse(IWSA(32, 2, window=4).cuda()).eval(), torch.randn(2, 9, 9, 32, device="cuda")
    with torch.no_grad():
        expected, stream = model(x), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.testing.assert_close(model(x), expected)          # on a non-default stream
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------------------------------------ setup.py
@pytest.mark.parametrize("reason", ["PyTorch", "no-such-compiler", "compiling failed"])
def test_without_pytorch_or_a_working_compiler_the_python_part_is_installed(tmp_path, reason):
    """And a note says why.  The sources are copied, as an earlier build may have left files beside them."""
    for name in ("setup.py", "pyproject.toml", "README.md", "scalablevit.py", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "torch.py").write_text("raise ImportError")
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    env = {"PyTorch": {"PYTHONPATH": str(tmp_path)}, "no-such-compiler": {"CXX": "no-such-compiler"},
           "compiling failed": {"CXX": str(tmp_path / "broken"), "CC": str(tmp_path / "broken")}}[reason]
    if reason != "PyTorch":
        (tmp_path / "torch.py").unlink()
    got = subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build"], cwd=tmp_path,
                         env=os.environ | env, capture_output=True, text=True)
    lines = [line for line in got.stderr.splitlines() if line.startswith("scalablevit:")]
    assert got.returncode == 0, got.stderr
    assert len(lines) == 1
    assert reason in lines[0]
    built = {path.name: path for path in (tmp_path / "build").rglob("*.*") if "lib" in str(path.parent)}
    assert set(built) == {"scalablevit.py", "__init__.py", "fuse.py", "ops.py", "not_built.txt"}
    assert reason in built["not_built.txt"].read_text()


def test_the_file_does_not_depend_on_the_kernels():
    """It imports only PyTorch and the standard library."""
    code = "import sys; import scalablevit; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "scalablevit_kernels" not in got
    assert "torchvision" not in got
    assert "scalablevit_kernels" not in pathlib.Path(scalablevit.__file__).read_text()
