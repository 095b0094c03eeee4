"""The C++/CUDA operators against the plain PyTorch forms in scalablevit.py.  The CUDA half is skipped without a GPU."""
import copy
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import scalablevit
from scalablevit import IWSA, scalablevit_tiny, window_merge, window_partition

ROOT = pathlib.Path(__file__).parents[1]
HAVE = scalablevit.KERNELS
needs_kernels = pytest.mark.skipif(not HAVE, reason="the extension is not built (or SCALABLEVIT_KERNELS=0)")
needs_cuda = pytest.mark.skipif("cuda" not in HAVE or not torch.cuda.is_available(), reason="no GPU, or no CUDA build")
on_devices = pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_kernels),
                                                pytest.param("cuda", marks=needs_cuda)])
ops = torch.ops.scalablevit
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
some = settings(max_examples=60, deadline=None)


def plain(f, *args):
    """f(*args) with the kernels off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalablevit, "KERNELS", ())
        return f(*args)


def merge_lim(z, qkv, weight, bias, M):
    """Z + LIM(V), from its definition."""
    H, W = qkv.shape[1:3]
    v = qkv.chunk(3, dim=-1)[2].permute(0, 3, 1, 2)
    lim = F.conv2d(v, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return window_merge(z, H, W, M) + lim.permute(0, 2, 3, 1)


def tensors(draw, dtype):
    """tensor(*shape): random numbers in any layout in memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def tensor(*shape, dtype=dtype):
        order = draw(st.permutations(range(len(shape))))           # of the dimensions in memory
        step = draw(st.sampled_from([1, 1, 2]))                    # 2: every second element of something larger
        full = torch.randn([shape[i] for i in order[:-1]] + [shape[order[-1]] * step], generator=generator).to(dtype)
        return full[..., ::step].permute([order.index(i) for i in range(len(shape))])

    return tensor


@st.composite
def cases(draw):
    """For IWSA's operators: sizes that M divides or not, maps smaller than a window."""
    B, H, W = draw(st.integers(0, 3)), draw(st.integers(1, 17)), draw(st.integers(1, 17))
    heads, d = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 12, 16, 20, 24, 32, 33]))
    M, k = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 5, 7]))
    dtype, C = draw(st.sampled_from(DTYPES)), heads * d
    windows, tensor = B * math.ceil(H / M) * math.ceil(W / M), tensors(draw, dtype)
    weights = draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)]))    # autocast: float32
    return dict(heads=heads, M=M, qkv=tensor(B, H, W, 3 * C), z=tensor(windows, heads, M * M, d),
                weight=tensor(C, 1, k, k, dtype=weights), bias=tensor(C, dtype=weights),
                grad_windows=tensor(3, windows, heads, M * M, d), grad=tensor(B, H, W, C))


def close(got, exact):
    """Within the rounding of got's dtype, measured against the largest element; exact is float64."""
    assert got.shape == exact.shape
    if exact.numel():
        error, scale = (got.cpu().double() - exact).abs().max(), exact.abs().max().clamp_min(1)
        assert error <= ROUNDING[got.dtype] * scale


@on_devices
@some
@given(case=cases())
def test_partition_moves_every_bit_both_ways(device, case):
    qkv, heads, M, grad = case["qkv"], case["heads"], case["M"], case["grad_windows"]
    assert torch.equal(ops.window_partition(qkv.to(device), heads, M).cpu(), plain(window_partition, qkv, heads, M))
    leaf = qkv.double().requires_grad_()
    plain(window_partition, leaf, heads, M).backward(grad.double())
    got = ops.window_partition_backward(grad.to(device), *qkv.shape[1:3], M)
    assert got.dtype == grad.dtype and torch.equal(got.cpu().double(), leaf.grad)


@on_devices
@some
@given(case=cases())
def test_merge_lim_against_its_definition_in_float64(device, case):
    names = ["z", "qkv", "weight", "bias"]
    exact = [case[name].double().requires_grad_() for name in names]
    given_ = [case[name].detach().to(device, copy=True).requires_grad_() for name in names]
    out, got = merge_lim(*exact, case["M"]), ops.window_merge_lim(*given_, case["M"])
    assert got.dtype == case["qkv"].dtype
    close(got.detach(), out.detach())
    out.backward(case["grad"].double())
    got.backward(case["grad"].to(device))
    for name, a, b in zip(names, given_, exact):
        assert a.grad.dtype == a.dtype, name
        close(a.grad, b.grad)


def iwsa(qkv, weight, bias, heads, M):
    """Each window alone: its real tokens attend to each other, and the convolution of the whole value map is added."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(3)                           # (B, H, W, heads, d) each
    out = F.conv2d(v.flatten(3).permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    rows = []
    for y in range(0, qkv.shape[1], M):
        row = []
        for x in range(0, qkv.shape[2], M):
            window = [t[:, y:y + M, x:x + M] for t in (q, k, v)]
            scores = torch.einsum("byxhd,bmnhd->bhyxmn", *window[:2]) / math.sqrt(q.shape[-1])
            row.append(torch.einsum("bhyxmn,bmnhd->byxhd", scores.flatten(4).softmax(-1).view_as(scores), window[2]))
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1).flatten(3) + out.permute(0, 2, 3, 1)


@needs_kernels
@some
@given(case=cases(), sharpness=st.sampled_from([1, 1, 30]))
def test_one_pass_against_windows_alone_in_float64(case, sharpness):
    """On a CPU.  With sharp scores a softmax has all but one of its weights near 0, and a large sum to keep from overflow."""
    names, heads, M = ["qkv", "weight", "bias"], case["heads"], case["M"]
    case["qkv"] = case["qkv"] * torch.where(torch.arange(case["qkv"].shape[-1]) < case["qkv"].shape[-1] // 3, sharpness, 1)
    exact = [case[name].double().requires_grad_() for name in names]
    given_ = [case[name].detach().clone().requires_grad_() for name in names]
    out, got = iwsa(*exact, heads, M), ops.iwsa(*given_, heads, M)
    assert got.dtype == case["qkv"].dtype
    close(got.detach(), out.detach())
    out.backward(case["grad"].double())
    got.backward(case["grad"])
    for name, a, b in zip(names, given_, exact):
        assert a.grad.dtype == a.dtype, name
        close(a.grad, b.grad)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_takes_windows_of_any_size(dtype):
    """A window of 23 x 19 tokens: more queries than are taken at once, and more keys than fit in registers."""
    qkv, weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 25, 19, 72), (24, 1, 3, 3), (24,)))
    out, exact = ops.iwsa(qkv, weight, bias, 2, 23), iwsa(qkv.double(), weight.double(), bias.double(), 2, 23)
    grad = torch.randn_like(out)
    close(out.detach(), exact.detach())
    for a, b in zip(torch.autograd.grad(out, (qkv, weight, bias), grad), torch.autograd.grad(exact, (qkv, weight, bias), grad.double())):
        close(a, b.double())


def ssa(q, k, v, heads, scale):
    """Equation (2) as it is written, head by head."""
    outs = []
    for q, k, v in zip(*(t.chunk(heads, dim=2) for t in (q, k, v))):
        outs.append((q @ k.transpose(1, 2) * scale).softmax(-1) @ v)
    return torch.cat(outs, dim=2)


@st.composite
def ssa_cases(draw):
    """More queries than a thread takes at once and fewer than a vector has; heads of two sizes, as SSA's are."""
    B, N, keys = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 5, 57, 448, 460])), draw(st.sampled_from([1, 7, 16, 49, 90]))
    heads, d, d_v = draw(st.integers(1, 3)), *(draw(st.sampled_from([1, 3, 8, 16, 20, 40])) for _ in "kv")
    dtype = draw(st.sampled_from(DTYPES))
    tensor, scale = tensors(draw, dtype), draw(st.sampled_from([0.0, 0.2, 1.0, 3.0]))
    return dict(q=tensor(B, N, heads * d), k=tensor(B, keys, heads * d), v=tensor(B, keys, heads * d_v),
                grad=tensor(B, N, heads * d_v), heads=heads, scale=scale)


@needs_kernels
@some
@given(case=ssa_cases())
def test_ssa_against_its_definition_in_float64(case):
    exact = [case[name].double().requires_grad_() for name in "qkv"]
    given_ = [case[name].detach().clone().requires_grad_() for name in "qkv"]
    out, got = ssa(*exact, case["heads"], case["scale"]), ops.ssa(*given_, case["heads"], case["scale"])
    assert got.dtype == case["q"].dtype
    close(got.detach(), out.detach())
    out.backward(case["grad"].double())
    got.backward(case["grad"])
    for name, a, b in zip("qkv", given_, exact):
        assert a.grad.dtype == a.dtype, name
        close(a.grad, b.grad)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [1, 9])
def test_in_one_pass_a_nan_stays_in_its_window(dtype, channel):
    """In a query or a value, forward and backward.  The buffers of a window of 3 x 3 are used again by one of 3 tokens."""
    qkv, weight, bias = torch.randn(1, 3, 4, 12).to(dtype), torch.zeros(4, 1, 1, 1).to(dtype), torch.zeros(4).to(dtype)
    qkv[0, 1, 0, channel] = math.nan
    dqkv, _, _ = ops.iwsa_backward(torch.randn(1, 3, 4, 4).to(dtype), qkv, weight, 1, 3)
    for result in ops.iwsa(qkv, weight, bias, 1, 3), dqkv:
        nan = result.isnan().any(-1)[0]
        assert nan[1, 0] and not nan[:, 3].any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_differ_in_the_last_bit(dtype):
    """Their products with the scale may be equal, and still the larger one has to be subtracted from both."""
    for x in torch.logspace(8, 14, 50, dtype=dtype):
        keys = torch.stack([x, torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))])[None, :, None]
        for d in range(20, 40):
            out = ops.ssa(torch.ones(1, 1, 1, dtype=dtype), keys, torch.eye(2, dtype=dtype)[None], 1, d ** -0.5)[0, 0]
            assert 0 <= out[0] <= out[1] and abs(out.sum() - 1) < 1e-5


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_scores_that_are_huge_select_one_key(dtype, scale):
    """Softmax of numbers far apart is one-hot, however large they are; in float32 and float64 up to 1e30."""
    size = {torch.float16: 30, torch.bfloat16: 1e4}.get(dtype, 1e15)
    for seed in range(30):
        torch.manual_seed(seed)
        q, k = torch.full((1, 3, 8), size, dtype=dtype), torch.randn(1, 17, 8).to(dtype) * size / scale
        scores = (q.double() @ k.double().transpose(1, 2) * scale)[0, 0]
        if scores.topk(2).values.diff().abs() < 0.05 * scores.abs().max():
            continue                                               # two that are close; their rounding would decide
        out = ops.ssa(q, k, torch.eye(17).to(dtype)[None], 1, scale)
        assert torch.equal(out[0], F.one_hot(scores.argmax(), 17).to(dtype).expand(3, -1))


@needs_kernels
def test_one_pass_needs_no_mask(monkeypatch):
    monkeypatch.setattr(scalablevit, "window_mask", None)          # (M², M²) per window: gigabytes for a large one
    assert IWSA(8, 1, window=90)(torch.randn(1, 100, 40, 8)).shape == (1, 100, 40, 8)


@needs_kernels
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_an_error_and_not_a_lost_tangent(grad):
    q, k, qkv = torch.randn(1, 5, 4), torch.randn(1, 3, 4), torch.randn(1, 4, 4, 12)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        for op, x, args in ((ops.ssa, q, (k, k, 2, 0.5)), (ops.window_partition, qkv, (2, 2)),
                            (ops.iwsa, qkv, (torch.zeros(4, 1, 3, 3), torch.zeros(4), 2, 2))):
            with pytest.raises(RuntimeError, match="forward mode|jvp"):
                op(forward_ad.make_dual(x, torch.ones_like(x)), *args)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_partition_then_merge_with_a_zero_kernel_is_the_identity(device, dtype):
    qkv = torch.randn(2, 9, 12, 48, device=device).to(dtype)
    for third, z in zip(qkv.chunk(3, dim=-1), ops.window_partition(qkv, 2, 5)):
        assert torch.equal(ops.window_merge_lim(z, qkv, qkv.new_zeros(16, 1, 3, 3), qkv.new_zeros(16), 5), third)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_what_they_are(device, dtype):
    def merge(z, bias):
        qkv, weight = z.new_zeros(1, 1, 1, 12), bias.new_zeros(4, 1, 3, 3)
        return ops.window_merge_lim(z.view(1, 1, 1, 4), qkv, weight, bias, 1).flatten()

    z = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max], dtype=dtype, device=device)
    got = merge(z, z.new_zeros(4))
    assert torch.equal(got.nan_to_num(7.0), z.nan_to_num(7.0)) and got[0].isnan()
    if dtype != torch.float64:                                     # a NaN that rounding its bits up would make a zero
        bias = torch.full((4,), 0x7fffffff, dtype=torch.int32, device=device).view(torch.float32)
        assert merge(z, bias).isnan().all()


@on_devices
def test_gradcheck(device):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)

    qkv, z, weight, bias = leaf(2, 4, 5, 12), leaf(2 * 2 * 2, 2, 9, 2), leaf(4, 1, 3, 3), leaf(4)
    assert torch.autograd.gradcheck(lambda x: ops.window_partition(x, 2, 3), qkv)
    assert torch.autograd.gradgradcheck(lambda x: ops.window_partition(x, 2, 3), qkv)
    assert torch.autograd.gradcheck(lambda *args: ops.window_merge_lim(*args, 3), (z, qkv, weight, bias))
    if device == "cpu":
        q, k, v = leaf(2, 5, 6), leaf(2, 3, 6), leaf(2, 3, 4)
        assert torch.autograd.gradcheck(lambda *args: ops.ssa(*args, 2, 0.7), (q, k, v))
        first, = torch.autograd.grad(ops.ssa(q, k, v, 2, 0.7).square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="SCALABLEVIT_KERNELS=0"):
            first.sum().backward()
        assert torch.autograd.gradcheck(lambda *args: ops.iwsa(*args, 2, 3), (qkv, weight, bias))
        first, = torch.autograd.grad(ops.iwsa(qkv, weight, bias, 2, 3).square().sum(), qkv, create_graph=True)
        with pytest.raises(NotImplementedError, match="SCALABLEVIT_KERNELS=0"):
            first.sum().backward()
    first, = torch.autograd.grad(ops.window_merge_lim(z, qkv, weight, bias, 3).square().sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="SCALABLEVIT_KERNELS=0"):
        first.sum().backward()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    def tensor(*shape):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    qkv, z, weight, bias = tensor(2, 8, 5, 24), tensor(2 * 3 * 2, 2, 9, 4), tensor(8, 1, 3, 3), tensor(8)
    torch.library.opcheck(ops.window_partition, (qkv, 2, 3))
    torch.library.opcheck(ops.window_partition_backward, (tensor(3, 2 * 3 * 2, 2, 9, 4), 8, 5, 3))
    torch.library.opcheck(ops.window_merge_lim, (z, qkv, weight, bias, 3))
    inputs = [t.detach() for t in (tensor(2, 8, 5, 8), qkv, weight)]       # it has no derivative of its own
    torch.library.opcheck(ops.window_merge_lim_backward, (*inputs, 2, 3))
    if device == "cpu":
        torch.library.opcheck(ops.iwsa, (qkv, weight, bias, 2, 3))
        torch.library.opcheck(ops.iwsa_backward, (*inputs, 2, 3))
        q, k, v = tensor(2, 9, 8), tensor(2, 5, 8), tensor(2, 5, 12)
        torch.library.opcheck(ops.ssa, (q, k, v, 2, 0.5))
        torch.library.opcheck(ops.ssa_backward, (torch.randn(2, 9, 12).to(dtype), q.detach(), k.detach(), v.detach(), 2, 0.5))


@on_devices
@pytest.mark.parametrize("autocast", [False, True])
def test_model_with_and_without(device, autocast):
    torch.manual_seed(0)
    model = scalablevit_tiny(num_classes=5).to(device)
    images = torch.randn(2, 3, 75, 110, device=device)              # no window side divides these maps

    def step():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast), FlopCounterMode(display=False) as flops:
            logits = model(images)
            logits.float().square().sum().backward()
        return logits.detach().float(), [p.grad.clone() for p in model.parameters()], flops.get_total_flops()

    (logits, grads, flops), (plain_logits, plain_grads, plain_flops) = step(), plain(step)
    bound = 5e-2 if autocast else 1e-4
    assert (logits - plain_logits).norm() <= bound * plain_logits.norm()
    norm = torch.cat([g.flatten() for g in plain_grads]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(grads, plain_grads)]).norm() <= bound * norm
    assert flops == plain_flops


def lim(**kwargs):
    """Puts another convolution in the place of LIM."""
    return lambda module: setattr(module, "lim", nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, "groups": 8} | kwargs))


def changes():
    """By name, what a reader may do to an IWSA of 8 channels, beyond what the kernels compute."""
    def hook(kind, result):
        return lambda module: getattr(module.lim, f"register_{kind}_hook")(result)

    def merge(module):
        module.merge = lambda z, v, qkv, M: window_merge(z, *qkv.shape[1:3], M)

    class Doubled(IWSA):
        def merge(self, z, v, qkv, M):
            return 2 * super().merge(z, v, qkv, M)

    return {
        "a hook": hook("forward", lambda layer, args, out: 0 * out),
        "a hook before": hook("forward_pre", lambda layer, args: 2 * args[0]),
        "a hook on gradients": hook("full_backward", lambda layer, into, out: (0 * into[0],)),
        "a hook on gradients before": hook("full_backward_pre", lambda layer, out: (0 * out[0],)),
        "a forward of its own": lambda module: setattr(module.lim, "forward", torch.zeros_like),
        "pruned": lambda module: prune.l1_unstructured(module.lim, "weight", 0.5),
        "spectral norm": lambda module: nn.utils.spectral_norm(module.lim),
        "dilated": lim(padding=2, dilation=2),
        "not depthwise": lim(groups=2),
        "circular": lim(padding_mode="circular"),
        "no bias": lim(bias=False),
        "oblong": lim(kernel_size=(3, 5), padding=(1, 2)),
        "no convolution": lambda module: setattr(module, "lim", nn.Identity()),
        "a merge of its own": merge,
        "a subclass": lambda module: setattr(module, "__class__", Doubled),
    }


@on_devices
@pytest.mark.parametrize("name", changes())
def test_what_a_reader_changes_is_what_runs(device, name):
    def train(change):
        torch.manual_seed(0)
        module, images = IWSA(8, 2, window=3), torch.randn(2, 7, 8, 8, device=device, requires_grad=True)
        change(module)
        optimizer, seen = torch.optim.SGD(module.to(device).parameters(), lr=0.1), []
        for _ in range(3):
            out = module(images)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            seen += [out.detach(), images.grad.clone()]
        return seen

    change = changes()[name]
    torch.testing.assert_close(train(change), plain(train, change))
    assert any(not torch.allclose(*both) for both in zip(train(change), train(lambda module: None)))


@on_devices
@pytest.mark.parametrize("kwargs", [{"stride": 2}, {"dilation": 2}, {"padding": 2}, {"kernel_size": 4, "padding": 2}], ids=str)
def test_a_convolution_that_does_not_fit_is_an_error_as_it_is_without_kernels(device, kwargs):
    module = IWSA(8, 2, window=3)
    lim(**kwargs)(module)
    with pytest.raises(RuntimeError):
        module.to(device)(torch.randn(2, 7, 8, 8, device=device))


@on_devices
def test_compile_and_export(device):
    model = IWSA(16, 2, window=3).to(device).eval()
    x = torch.randn(2, 7, 8, 16, device=device, requires_grad=True)
    out, expected = torch.compile(copy.deepcopy(model), fullgraph=True)(x), model(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected)))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert any("scalablevit" in str(node.target) for node in program.graph.nodes)
    larger = torch.randn(5, 7, 8, 16, device=device)
    torch.testing.assert_close(program.module()(larger), model(larger))


@on_devices
def test_same_bits_in_every_run_and_for_any_number_of_threads(device):
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
                q, k = qkv.flatten(1, 2), grad.flatten(1, 2)[:, :99]
                seen[-1] += ops.ssa(q[..., :40], k, k, 2, 0.5), *ops.ssa_backward(q[..., :40], q[..., 40:80], k, k, 2, 0.5)
    finally:
        torch.set_num_threads(threads)
    for results in seen[1:]:
        assert all(map(torch.equal, results, seen[0]))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_larger_than_the_caches_has_the_bits_of_its_images_alone(device, dtype):
    """On a CPU it goes past the caches (the merged map in float32 and float64), and that of one image does not; nor do
    heads that are not whole lines of 64 bytes, such as 33 channels."""
    threads = torch.get_num_threads()
    for d, M, k in (32, 7, 3), (24, 4, 5), (33, 5, 3):
        C = 2 * d
        qkv, weight = torch.randn(100, 13, 17, 3 * C, device=device).to(dtype), torch.randn(C, 1, k, k, device=device).to(dtype)
        z = torch.randn(100 * math.ceil(13 / M) * math.ceil(17 / M), M * M, 2, d, device=device).to(dtype).transpose(1, 2)
        try:
            for n in 1, 2:
                torch.set_num_threads(n)
                windows, out = ops.window_partition(qkv, 2, M), ops.window_merge_lim(z, qkv, weight, weight[:, 0, 0, 0], M)
                assert torch.equal(windows, torch.cat([ops.window_partition(x, 2, M) for x in qkv.split(1)], dim=1))
                assert torch.equal(ops.window_partition_backward(windows, 13, 17, M), qkv)
                assert torch.equal(out, torch.cat([ops.window_merge_lim(own, x, weight, weight[:, 0, 0, 0], M)
                                                   for own, x in zip(z.chunk(100), qkv.split(1))]))
        finally:
            torch.set_num_threads(threads)


@needs_cuda
def test_cuda_graph():
    model, x = IWSA(32, 2, window=4).cuda().eval(), torch.randn(2, 9, 9, 32, device="cuda")
    with torch.no_grad():
        expected, stream = model(x), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.testing.assert_close(model(x), expected)          # on another stream than the default one
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
    torch.testing.assert_close(out, expected)


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
    partition, merge = "window_partition", "window_merge_lim"
    return [
        ("shape", partition, qkv[0], 2, 3),
        ("channels", partition, qkv[..., :23], 2, 3),
        ("channels", partition, qkv, 3, 3),
        ("channels", partition, qkv, 0, 3),
        ("channels", partition, qkv[..., :0], 2, 3),
        ("window", partition, qkv, 2, 0),
        ("window", partition, qkv, 2, -3),
        ("window", partition, qkv, 2, 2 ** 40),
        ("at least one row", partition, qkv[:, :0], 2, 3),
        ("float32", partition, qkv.int(), 2, 3),
        ("shape", partition + "_backward", z, 6, 6, 3),
        ("fit", partition + "_backward", torch.randn(3, 7, 2, 9, 4), 6, 6, 3),
        ("fit", partition + "_backward", torch.randn(3, 8, 2, 8, 4), 6, 6, 3),
        ("at least one row", partition + "_backward", torch.randn(3, 8, 2, 9, 4), 0, 6, 3),
        ("fewer than 2", partition + "_backward", torch.randn(3, 8, 2, 9, 4), 3 * 2 ** 32, 3 * 2 ** 32, 3),
        ("shape", merge, z[0], qkv, weight, bias, 3),
        ("fit", merge, z[:7], qkv, weight, bias, 3),
        ("fit", merge, z, qkv, weight, bias, 2),
        ("dtype", merge, z.double(), qkv, weight, bias, 3),
        ("dtype", merge, z, qkv, weight, bias.double(), 3),
        ("weight must be", merge, z, qkv, weight.double(), bias.double(), 3),
        ("weight must be", merge, z, qkv, weight.bfloat16(), bias.bfloat16(), 3),
        ("odd", merge, z, qkv, torch.randn(8, 1, 2, 2), bias, 3),
        ("odd", merge, z, qkv, torch.randn(8, 1, 3, 5), bias, 3),
        ("shape", merge, z, qkv, weight[:4], bias, 3),
        ("bias", merge, z, qkv, weight, bias[:4], 3),
        ("window", merge, z, qkv, weight, bias, 0),
        ("grad", merge + "_backward", torch.randn(2, 6, 6, 4), qkv, weight, 2, 3),
        ("dtype", merge + "_backward", torch.randn(2, 6, 6, 8).half(), qkv, weight, 2, 3),
        ("odd", merge + "_backward", torch.randn(2, 6, 6, 8), qkv, torch.randn(8, 1, 4, 4), 2, 3),
    ]


def bad_inputs_of_one_pass():
    qkv, weight, bias = torch.randn(2, 6, 6, 24), torch.randn(8, 1, 3, 3), torch.randn(8)
    q, k, v = torch.randn(2, 9, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    return [
        ("shape", "iwsa", qkv[0], weight, bias, 2, 3),
        ("channels", "iwsa", qkv, weight, bias, 3, 3),
        ("window", "iwsa", qkv, weight, bias, 2, 0),
        ("float32", "iwsa", qkv.int(), weight, bias, 2, 3),
        ("dtype", "iwsa", qkv, weight, bias.double(), 2, 3),
        ("weight must be", "iwsa", qkv, weight.bfloat16(), bias.bfloat16(), 2, 3),
        ("odd", "iwsa", qkv, torch.randn(8, 1, 2, 2), bias, 2, 3),
        ("bias", "iwsa", qkv, weight, bias[:4], 2, 3),
        ("grad", "iwsa_backward", torch.randn(2, 6, 6, 4), qkv, weight, 2, 3),
        ("dtype", "iwsa_backward", torch.randn(2, 6, 6, 8).half(), qkv, weight, 2, 3),
        ("odd", "iwsa_backward", torch.randn(2, 6, 6, 8), qkv, torch.randn(8, 1, 4, 4), 2, 3),
        ("shapes", "ssa", q[0], k, v, 2, 1.0),
        ("fit", "ssa", q, k[:1], v, 2, 1.0),
        ("fit", "ssa", q, k, v[:, :3], 2, 1.0),
        ("fit", "ssa", q, k[..., :6], v, 2, 1.0),
        ("at least one key", "ssa", q, k[:, :0], v[:, :0], 2, 1.0),
        ("heads", "ssa", q, k, v, 3, 1.0),
        ("heads", "ssa", q, k, v, 0, 1.0),
        ("heads", "ssa", q, k, v[..., :0], 2, 1.0),
        ("scale", "ssa", q, k, v, 2, -1.0),
        ("dtype", "ssa", q, k.double(), v, 2, 1.0),
        ("float32", "ssa", q.int(), k.int(), v.int(), 2, 1.0),
        ("one device", "ssa", q, k, v.to("meta"), 2, 1.0),
        ("one device", "iwsa", qkv, weight, bias.to("meta"), 2, 3),
        ("grad", "ssa_backward", q, q, k, v, 2, 1.0),
        ("dtype", "ssa_backward", torch.randn(2, 9, 12).half(), q, k, v, 2, 1.0),
    ]


@needs_kernels
@pytest.mark.parametrize("match, op, args", [(match, op, args) for match, op, *args in bad_inputs_of_one_pass()])
def test_bad_input_of_one_pass(match, op, args):
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(*args)


@on_devices
@pytest.mark.parametrize("match, op, args", [(match, op, args) for match, op, *args in bad_inputs()])
def test_bad_input_is_an_error_that_says_what_is_accepted(device, match, op, args):
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))


@needs_cuda
def test_mixed_devices():
    qkv, z, weight, bias = torch.randn(2, 6, 6, 24), torch.randn(8, 2, 9, 4), torch.randn(8, 1, 3, 3), torch.randn(8)
    with pytest.raises(RuntimeError, match="device"):
        ops.window_merge_lim(z.cuda(), qkv, weight, bias, 3)
    with pytest.raises(RuntimeError, match="device"):
        ops.window_merge_lim(z.cuda(), qkv.cuda(), weight, bias, 3)


def run(*command, **env):
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_which_kernels_are_used():
    assert "kernels: none" in run(sys.executable, "scalablevit.py", SCALABLEVIT_KERNELS="0").stdout
    if HAVE:
        assert f"kernels: {', '.join(HAVE)}" in run(sys.executable, "scalablevit.py").stdout


def test_a_module_that_does_not_load_is_a_warning(tmp_path):
    (tmp_path / "scalablevit_kernels.py").write_text("raise ImportError('undefined symbol')")
    got = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
              "import scalablevit; print(scalablevit.KERNELS)", SCALABLEVIT_KERNELS="1")
    assert got.stdout == "()\n" and "plain PyTorch is used" in got.stderr


@needs_kernels
def test_a_copy_of_the_file_beside_the_installed_one(tmp_path):
    shutil.copy(scalablevit.__file__, tmp_path / "backbone.py")
    got = run(sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r})\n"
              "import scalablevit, backbone; print(backbone.KERNELS)")
    assert got.stdout == f"{HAVE}\n", got.stderr


@pytest.mark.parametrize("reason", ["PyTorch", "compiler"])
def test_without_torch_or_a_compiler_the_python_module_is_installed(tmp_path, reason):
    (tmp_path / "torch.py").write_text("raise ImportError")
    env = {"PyTorch": {"PYTHONPATH": str(tmp_path)}, "compiler": {"CXX": "no-such-compiler"}}[reason]
    got = run(sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), **env)
    lines = [line for line in got.stderr.splitlines() if line.startswith("scalablevit:")]
    assert got.returncode == 0 and len(lines) == 1 and reason in lines[0], got.stderr
    assert [path.name for path in (tmp_path / "build").rglob("*.*")] == ["scalablevit.py"]
