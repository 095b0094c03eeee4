"""What `fuse` and `unfuse` do to a model: the same results, which layers are left alone and why.

Skipped if the package is not installed.  Without its compiled part most tests still run.  test_modes.py has
a fused model under compile, export, DDP and so on.
"""
import copy
import runpy
import sys
from unittest import mock

import pytest
import torch
import torch.nn.utils.prune as prune
from hypothesis import given, settings, strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

import scalablevit
from helpers import small, softmax_attention
from scalablevit import IWSA, SSA, count_macs

pytest.importorskip("scalablevit_kernels")
from scalablevit_kernels import FusedIWSA, FusedSSA, fuse, unfuse  # noqa: E402

fuse_module = sys.modules["scalablevit_kernels.fuse"]               # its name in the package is the function
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def kinds(model):
    return [type(layer) for layer in model.modules()]


def fused_kinds(model):
    return {FusedIWSA, FusedSSA} & set(kinds(model))


def distance(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


@settings(max_examples=60)
@given(heads=st.integers(1, 3), n=st.integers(1, 20), m=st.sampled_from([1, 5, 127, 128, 130, 511, 512, 520]),
       d=st.integers(1, 40), d_v=st.integers(1, 40), masked=st.booleans(), inference=st.booleans(),
       precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]))
def test_attention_against_its_definition(heads, n, m, d, d_v, masked, inference, precision):
    """With few and many keys, or queries at a time; d smaller and larger than d_v; with and without a mask."""
    dtype, bound = precision
    q, k, v = (torch.randn(heads, *shape).to(dtype) for shape in ((n, d), (m, d), (m, d_v)))
    seen = torch.rand(m) < (0.5 if masked else 2)
    seen[0] = True
    with torch.inference_mode(inference), mock.patch.object(fuse_module, "SCORES_AT_ONCE", 7 * heads * m):
        got = fuse_module.attention(q[None], k[None], v[None], 0.3, seen.expand(1, 1, 1, m))[0]
    assert got.dtype == dtype
    exact = softmax_attention(q.double(), k[:, seen].double(), v[:, seen].double(), 1, 0.3)
    assert got.shape == exact.shape
    for head in range(heads):
        assert distance(got[head], exact[head]) < bound


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_model_has_the_same_outputs_gradients_and_cost(device, autocast):
    model = small().to(device)
    images = torch.randn(2, 3, 123, 110, device=device)             # cut windows; 224 and 224 keys

    def step():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(images)
        logits.float().square().sum().backward()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            inferred = model(images)
        return logits.detach(), inferred, torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, state, before = step(), copy.deepcopy(model.state_dict()), kinds(model)
    cost = count_macs(model, (123, 110))
    assert fuse(model) is model
    assert {*kinds(model)} - {*before} == {FusedIWSA, FusedSSA}
    assert {*before} - {*kinds(model)} == {IWSA, SSA}
    assert count_macs(model, (123, 110)) == cost
    for fused, own in zip(step(), plain):
        assert fused.dtype == own.dtype
        assert distance(fused, own) < (5e-2 if autocast else 1e-4)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert unfuse(model) is model
    assert kinds(model) == before
    assert all(map(torch.equal, step(), plain))


@pytest.mark.parametrize("dtype, side", [(torch.float32, 48), (torch.bfloat16, 96)])
def test_fused_ssa_never_makes_the_score_matrix(dtype, side):
    """Forward and backward, on a map with more keys than the limit; the plain layer does."""
    layer, x = SSA(8, 2, 1.25, 1 / 16).to(dtype), torch.randn(1, side, side, 8, dtype=dtype)
    for cls in (SSA, FusedSSA):
        layer.__class__ = cls
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        assert (torch.ops.aten.bmm in counter.get_flop_counts()["Global"]) == (cls is SSA)


class Doubled(IWSA):
    def attend(self, qkv, top=0, left=0):
        return 2 * super().attend(qkv, top, left)


class Adapter(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def part(name, make):
    """Replace a part of the layer, or of another part."""
    return lambda layer: setattr(layer, name, make(layer))


def lim(**kwargs):
    return part("lim", lambda layer: nn.Conv2d(8, 8, **dict(kernel_size=3, padding=1, groups=8) | kwargs))


def hook(kind, result):
    return lambda layer: getattr(layer.lim, f"register_{kind}_hook")(result)


NOTICED = {  # changes of LIM, noticed before and after fuse: name -> (change, reason that is printed)
    "a hook": (hook("forward", lambda layer, args, out: 0 * out), "lim has a hook"),
    "a hook before": (hook("forward_pre", lambda layer, args: 2 * args[0]), "lim has a hook"),
    "a hook on gradients": (hook("full_backward", lambda layer, into, out: (0 * into[0],)), "lim has a hook"),
    "and before": (hook("full_backward_pre", lambda layer, out: (0 * out[0],)), "lim has a hook"),
    "a forward": (lambda layer: setattr(layer.lim, "forward", torch.zeros_like), "lim has a method of"),
    "pruned": (lambda layer: prune.l1_unstructured(layer.lim, "weight", 0.5), "lim has a hook"),
    "parametrized": (lambda layer: register_parametrization(layer.lim, "weight", Halved()),
                     "lim is a torch.nn.utils.parametrize.ParametrizedConv2d"),
    "dilated": (lim(padding=2, dilation=2), "lim is not"),
    "not depthwise": (lim(groups=2), "lim is not"),
    "circular": (lim(padding_mode="circular"), "lim is not"),
    "no bias": (lim(bias=False), "lim is not"),
    "oblong": (lim(kernel_size=(3, 5), padding=(1, 2)), "lim is not"),
    "no convolution": (part("lim", lambda layer: nn.Identity()), "lim is a torch.nn.modules"),
    "a subclass": (part("__class__", lambda layer: Doubled), "a test_fuse.Doubled, not"),
}
BEFORE = {  # only noticed before
    "dropout": (part("proj", lambda layer: nn.Sequential(layer.proj, nn.Dropout(1.0))), "proj is a"),
    "an adapter": (lambda layer: setattr(layer.qkv, "__class__", Adapter), "qkv is a test_fuse.Adapter"),
    "an unused part": (part("gate", lambda layer: nn.Linear(8, 8)), "gate is a"),
    "an attention": (part("attend", lambda layer: lambda qkv: 0 * qkv[..., :8]), "it has a method of its"),
}


def outputs(*changes):
    """And gradients of an IWSA after changes, of which `fuse` may be one."""
    torch.manual_seed(0)
    module, x = IWSA(8, 2, window=3), torch.randn(2, 7, 8, 8, requires_grad=True)
    for change in changes:
        change(module)
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", [*NOTICED, *BEFORE])
def test_a_changed_layer_is_left_alone_and_named_with_its_reason(name, capsys):
    change, reason = (NOTICED | BEFORE)[name]
    plain = outputs(change)
    assert "unused" in name or not all(map(torch.allclose, plain[:2], outputs()))
    torch.testing.assert_close(outputs(change, fuse), plain)
    printed = capsys.readouterr().out
    assert printed.startswith("not fused: the model (")
    assert reason in printed
    if name in NOTICED:
        torch.testing.assert_close(outputs(fuse, change), plain)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "q", "v"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def of_another_file(model):
    model.stages[0].blocks[0].attn = type("IWSA", (nn.Identity,), {"__module__": "backbone"})()
    return model


def hooked(model):
    for stage in model.stages:
        stage.blocks[1].attn.proj.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize("change, left, reason", [
    (quantised, 4, "qkv is a torch.ao.nn.quantized"), (adapted, 4, "qkv is a peft.tuners.lora"),
    (hooked, 2, "not fused: stages.0.blocks.1.attn, stages.1.blocks.1.attn (proj has a hook)\n"),
    (of_another_file, 1, "not fused: stages.0.blocks.0.attn (a backbone.IWSA, not scalablevit.IWSA or"),
    (lambda model: model.to("meta"), 4, "meta")])
def test_layers_of_a_model_are_left_alone(change, left, reason, capsys):
    model, x = change(small().eval()), torch.randn(1, 3, 40, 40)
    x = x.to(next(model.parameters(), x).device)
    before = model(x)
    fuse(model)
    assert sum(kind in (FusedIWSA, FusedSSA) for kind in kinds(model)) == 4 - left
    assert reason in capsys.readouterr().out
    if not x.is_meta:
        torch.testing.assert_close(model(x), before)


def test_global_hooks_see_every_layer_even_after_fuse(capsys):
    layer, x, seen = fuse(IWSA(8, 2, window=3)), torch.randn(1, 4, 4, 8), []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        layer(x)
        assert nn.Conv2d in seen
        assert type(fuse(IWSA(8, 2))) is IWSA
    finally:
        handle.remove()
    assert "global" in capsys.readouterr().out


attention, attend, forward = scalablevit.attention, IWSA.attend, SSA.forward


def narrower(self, qkv, top=0, left=0):
    """As if M = min(window, min(H, W)) in the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self, "window", min(self.window, *qkv.shape[1:3]))
        return attend(self, qkv, top, left)


def broken(self, x):
    raise ZeroDivisionError("half an edit")


DIFFERS = "it does not compute what its fused form computes"


@pytest.mark.parametrize("owner, name, edit, classes, reason", [
    (scalablevit, "attention", lambda q, k, v, scale, mask=None: attention(q, k, v, scale / 2, mask),
     ["IWSA", "SSA"], DIFFERS),
    (scalablevit.WSA, "attend", narrower, ["IWSA"], DIFFERS),
    (SSA, "forward", lambda self, x: forward(self, x) * (2 if self.training else 1), ["SSA"], DIFFERS),
    (SSA, "forward", lambda self, x: forward(self, x) * (1 if self.training else 2), ["SSA"], DIFFERS),
    (IWSA, "forward", broken, ["IWSA"],
     "comparing it with its fused form raised ZeroDivisionError: half an edit")])
def test_an_edit_is_found_and_named(owner, name, edit, classes, reason, monkeypatch, capsys):
    """Also one that only affects maps narrower than a window, or one mode."""
    monkeypatch.setattr(owner, name, edit)
    model = fuse(nn.Sequential(IWSA(8, 2), SSA(8, 2)))
    assert {cls.__name__ for cls in kinds(model)} & {"IWSA", "SSA"} == set(classes)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not")]
    assert printed == [f"not fused: all layers of class {name} ({reason})" for name in classes]


@pytest.mark.parametrize("context", [
    torch.device("meta"), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16),
    torch.float64, torch.bfloat16], ids=str)
def test_whatever_the_callers_modes_and_default_dtype(context, monkeypatch):
    """And the random state stays as it was."""
    model, before = small(), torch.get_rng_state()
    try:
        if isinstance(context, torch.dtype):
            torch.set_default_dtype(context)
            fuse(model)
        else:
            with context:
                fuse(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fused_kinds(model) == {FusedIWSA, FusedSSA}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_part_that_cannot_be_loaded_is_done_without(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scalablevit_kernels._C", None)
    again = runpy.run_path(fuse_module.__file__, run_name="scalablevit_kernels.again")
    model, x = nn.Sequential(IWSA(8, 2, window=12), SSA(8, 2)), torch.randn(2, 13, 20, 8)
    before = model(x)
    again["fuse"](model)
    assert kinds(model)[1] is again["FusedIWSA"]
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert torch.ops.aten.bmm not in counter.get_flop_counts()["Global"]                # PyTorch's attention
    assert "fused without the compiled kernels: import of" in capsys.readouterr().out


def test_another_lim_than_the_cuda_kernels_runs_as_in_the_file(monkeypatch):
    """On fake tensors of a GPU, where the operator refuses 5 x 5 and the layer does not call it."""
    monkeypatch.setattr(fuse_module, "devices", ("cpu", "cuda"))
    with FakeTensorMode(), torch.device("cuda"):
        layer, qkv = IWSA(8, 2), torch.randn(2, 13, 20, 24)
        layer.lim = scalablevit.depthwise(8, 5)
        layer.__class__ = FusedIWSA
        assert layer(torch.randn(2, 13, 20, 8)).shape == (2, 13, 20, 8)
        z = torch.ops.scalablevit.window_partition(qkv, 2, 7)[0]
        with pytest.raises(RuntimeError, match="on a GPU 3, got k=5"):
            torch.ops.scalablevit.window_merge_lim(z, qkv, layer.lim.weight, layer.lim.bias, 7)
