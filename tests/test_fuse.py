"""What `fuse` and `unfuse` do to a model: the same results, which layers are left alone and why, what works with it.

Skipped if the package is not installed.  Without its compiled part most tests still run.
"""
import copy
import io
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune as prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import scalablevit
from helpers import random_tokens, randomised, softmax_attention, ssa_by_hand
from scalablevit import IWSA, SSA, ScalableViT, count_macs

kernels = pytest.importorskip("scalablevit_kernels")
from scalablevit_kernels import FusedIWSA, FusedSSA, fuse, unfuse  # noqa: E402

fuse_module = sys.modules["scalablevit_kernels.fuse"]               # its name in the package is the function
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
on_devices = pytest.mark.parametrize("device", DEVICES)
FUSED = {IWSA: FusedIWSA, SSA: FusedSSA}


def small(**kwargs):
    """Two stages with cut windows, r_n < 1 and r_n = 1."""
    torch.manual_seed(0)
    return ScalableViT(**dict(dim=16, depths=(2, 2), heads=(1, 2), rc=(1.25, 1.0), rn=(1 / 4, 1), window=3,
                              num_classes=5, head_hidden=16) | kwargs)


def kinds(model):
    return [type(layer) for layer in model.modules()]


def distance(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


# ------------------------------------------------------------------------------------------------ the two layers
@settings(max_examples=60)
@given(st.data())
def test_attention_against_its_definition(data):
    """With few and many keys, d smaller and larger than d_v, with and without a mask, in all dtypes."""
    draw = data.draw
    heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    m = draw(st.sampled_from([1, 5, 127, 128, 130, 511, 512, 520]))
    d, d_v = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype, bound = draw(st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]))
    q, k, v = (random_tokens(heads, *shape, seed=i).to(dtype) for i, shape in enumerate([(n, d), (m, d), (m, d_v)]))
    keep = torch.ones(m, dtype=torch.bool)
    if draw(st.booleans()):
        keep[1:] = torch.rand(m - 1) < 0.5
    got = fuse_module.attention(q[None], k[None], v[None], 0.3, keep.expand(1, 1, 1, m))[0]
    assert got.shape == (heads, n, d_v)
    assert got.dtype == dtype
    for h in range(heads):
        exact = softmax_attention(q[h].double(), k[h, keep].double(), v[h, keep].double(), 1, 0.3)
        assert distance(got[h], exact) < bound


@settings(max_examples=25)
@given(st.data())
def test_fused_ssa_against_loops(data):
    """On maps whose number of keys is below and above the limit."""
    s, rc = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([0.5, 1.0, 1.25, 2.0]))
    H, W = data.draw(st.integers(1, 16 * s)), data.draw(st.integers(1, 16 * s))
    layer = randomised(SSA(8, 2, rc, 1 / s ** 2))
    layer.__class__ = FusedSSA
    x = random_tokens(1, H, W, 8)
    torch.testing.assert_close(layer(x), ssa_by_hand(layer, x, rc, s), rtol=1e-9, atol=1e-9)


@on_devices
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
    assert FusedIWSA in kinds(model)
    assert FusedSSA in kinds(model)
    assert count_macs(model, (123, 110)) == cost
    for fused, own in zip(step(), plain):
        assert fused.dtype == own.dtype
        assert distance(fused, own) < (5e-2 if autocast else 1e-4)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert unfuse(model) is model
    assert kinds(model) == before
    for undone, own in zip(step(), plain):
        assert torch.equal(undone, own)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.seen = max(self.seen, t.numel())
        return result


@pytest.mark.parametrize("dtype, side", [(torch.float32, 48), (torch.bfloat16, 96)])
def test_fused_ssa_never_makes_the_score_matrix(dtype, side):
    """Forward and backward, on a map with more keys than the limit; the plain layer does make it."""
    layer, x = SSA(8, 2, 1.25, 1 / 16).to(dtype), torch.randn(1, side, side, 8, dtype=dtype)
    scores = 2 * side ** 2 * (side // 4) ** 2                       # heads · N · N_rn
    for cls in (SSA, FusedSSA):
        layer.__class__ = cls
        with Largest() as largest:
            layer(x).sum().backward()
        assert (largest.seen >= scores) == (cls is SSA)


# ------------------------------------------------------------------------------------------------ layers left alone
class Doubled(IWSA):
    def attend(self, qkv, top=0, left=0):
        return 2 * super().attend(qkv, top, left)


class Adapter(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def lim(**kwargs):
    """Replace LIM by another convolution."""
    arguments = dict(kernel_size=3, padding=1, groups=8) | kwargs
    return lambda module: setattr(module, "lim", nn.Conv2d(8, 8, **arguments))


def hook(kind, result):
    return lambda module: getattr(module.lim, f"register_{kind}_hook")(result)


def temperature(module):
    """A parameter unknown to the kernels."""
    module.temperature = nn.Parameter(torch.tensor(2.0))
    attend = module.attend
    module.attend = lambda qkv: module.temperature * attend(qkv)


NOTICED = {  # changes of LIM, which are noticed before and after fuse: name -> (change, reason that is printed)
    "a hook": (hook("forward", lambda layer, args, out: 0 * out), "lim has a hook"),
    "a hook before": (hook("forward_pre", lambda layer, args: 2 * args[0]), "lim has a hook"),
    "a hook on gradients": (hook("full_backward", lambda layer, into, out: (0 * into[0],)), "lim has a hook"),
    "a hook on gradients before": (hook("full_backward_pre", lambda layer, out: (0 * out[0],)), "lim has a hook"),
    "a forward of its own": (lambda module: setattr(module.lim, "forward", torch.zeros_like), "a method of its own"),
    "pruned": (lambda module: prune.l1_unstructured(module.lim, "weight", 0.5), "lim has a hook"),
    "parametrized": (lambda module: nn.utils.parametrize.register_parametrization(module.lim, "weight", Halved()),
                     "lim is a torch.nn.utils.parametrize.ParametrizedConv2d"),
    "dilated": (lim(padding=2, dilation=2), "lim is not"),
    "not depthwise": (lim(groups=2), "lim is not"),
    "circular": (lim(padding_mode="circular"), "lim is not"),
    "no bias": (lim(bias=False), "lim is not"),
    "oblong": (lim(kernel_size=(3, 5), padding=(1, 2)), "lim is not"),
    "no convolution": (lambda module: setattr(module, "lim", nn.Identity()), "lim is a torch.nn.modules"),
    "a subclass": (lambda module: setattr(module, "__class__", Doubled), "a test_fuse.Doubled, not"),
}
BEFORE = {  # only noticed before
    "dropout": (lambda module: setattr(module, "proj", nn.Sequential(module.proj, nn.Dropout(1.0))), "proj is a"),
    "an adapter": (lambda module: setattr(module.qkv, "__class__", Adapter), "qkv is a test_fuse.Adapter"),
    "a part of its own": (lambda module: setattr(module, "gate", nn.Linear(8, 8)), "gate is a"),
    "a parameter of its own": (temperature, "a method of its own"),
    "an attention of its own": (lambda module: setattr(module, "attend", lambda qkv: 0 * qkv[..., :8]),
                                "a method of its own"),
}


def trained(change, when=None):
    """Outputs and gradients of three steps of an IWSA that is changed, and fused before or after the change."""
    torch.manual_seed(0)
    module, images = IWSA(8, 2, window=3), torch.randn(2, 7, 8, 8, requires_grad=True)
    if when == "fused before":
        fuse(module)
    change(module)
    if when == "fused after":
        fuse(module)
    optimizer, seen = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(3):
        torch.manual_seed(1)
        out = module(images)
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        seen += [out.detach(), images.grad.clone()]
    return seen


@pytest.mark.parametrize("name", [*NOTICED, *BEFORE])
def test_a_changed_layer_is_left_alone_and_named_with_its_reason(name, capsys):
    change, reason = (NOTICED | BEFORE)[name]
    plain, unchanged = trained(change), trained(lambda module: None)
    assert name == "a part of its own" or any(not torch.allclose(*pair) for pair in zip(plain, unchanged))
    torch.testing.assert_close(trained(change, "fused after"), plain)
    printed = capsys.readouterr().out
    assert printed.startswith("not fused: the model (")
    assert reason in printed


@pytest.mark.parametrize("name", NOTICED)
def test_what_can_be_noticed_after_fuse_runs_as_changed(name):
    change, _ = NOTICED[name]
    torch.testing.assert_close(trained(change, "fused before"), trained(change))


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


def test_a_layer_on_the_meta_device_is_left_alone(capsys):
    with torch.device("meta"):
        model = small()
    assert not set(FUSED.values()) & set(kinds(fuse(model)))
    assert "meta" in capsys.readouterr().out
    model.to_empty(device="cpu")
    assert {FusedIWSA, FusedSSA} < set(kinds(fuse(model)))


def test_classes_of_another_file_are_named(capsys):
    own = type("IWSA", (nn.Linear,), {"__module__": "backbone"})    # such as a copy of the file
    model = fuse(nn.Sequential(own(2, 2), SSA(8, 2)))
    assert kinds(model)[1:3] == [own, FusedSSA]
    assert capsys.readouterr().out == "not fused: 0 (a backbone.IWSA, not scalablevit.IWSA or scalablevit.SSA)\n"


def test_layers_with_the_same_reason_share_a_line(capsys):
    model = small()
    for layer in model.modules():
        if type(layer) is SSA:
            layer.proj.register_forward_hook(lambda *args: None)
    fuse(model)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not fused")]
    assert lines == ["not fused: stages.0.blocks.1.attn, stages.1.blocks.1.attn (proj has a hook)"]


def test_quantised_layers_are_left_alone(capsys):
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(IWSA(8, 2, window=3)), {nn.Linear})
    x = torch.randn(1, 4, 4, 8)
    before = model(x)
    assert torch.equal(fuse(model)(x), before)
    assert "qkv is a torch.ao.nn.quantized" in capsys.readouterr().out


def test_a_strided_bias_and_quantize_dynamic_after_fuse():
    """Both went wrong when `fuse` also switched linear layers."""
    model = nn.Sequential(nn.Linear(8, 8), IWSA(8, 2, window=3))
    model[0].bias = nn.Parameter(torch.randn(1).expand(8))
    x = torch.randn(1, 4, 4, 8)
    with torch.inference_mode():
        before = model(x)
        torch.testing.assert_close(fuse(model)(x), before)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert nn.Linear not in kinds(quantised)


def test_models_under_peft_adapters(capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "q", "v"], init_lora_weights=False)
    model = peft.get_peft_model(small().eval(), config)
    x = torch.randn(1, 3, 40, 40)
    before = model(x)
    assert torch.equal(fuse(model)(x), before)
    assert "qkv is a peft.tuners.lora" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ edited files
def slower_softmax(q, k, v, scale, mask=None):
    return attention(q, k, v, scale / 2, mask)


attention = scalablevit.attention


def test_an_edit_of_attention_is_found(monkeypatch, capsys):
    monkeypatch.setattr(scalablevit, "attention", slower_softmax)
    assert not set(FUSED.values()) & set(kinds(fuse(small())))
    assert capsys.readouterr().out.splitlines() == [
        f"not fused: all layers of class {name} (it does not compute what its fused form computes)"
        for name in ("IWSA", "SSA")]


def test_an_edit_that_only_affects_maps_narrower_than_a_window_is_found(monkeypatch, capsys):
    attend = IWSA.attend

    def narrower(self, qkv, top=0, left=0):                         # as M = min(window, min(H, W)) in the file
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "window", min(self.window, *qkv.shape[1:3]))
            return attend(self, qkv, top, left)

    monkeypatch.setattr(scalablevit.WSA, "attend", narrower)
    assert kinds(fuse(nn.Sequential(IWSA(8, 2, window=5), SSA(8, 2))))[1] is IWSA
    assert "class IWSA (it does not compute" in capsys.readouterr().out


@pytest.mark.parametrize("training", [True, False])
def test_an_edit_that_only_affects_one_mode_is_found(monkeypatch, training):
    forward = SSA.forward
    monkeypatch.setattr(SSA, "forward", lambda self, x: forward(self, x) * (2 if self.training == training else 1))
    assert type(fuse(SSA(8, 2))) is SSA


def test_an_exception_while_comparing_is_named(monkeypatch, capsys):
    def broken(self, x):
        raise ZeroDivisionError("half an edit")

    monkeypatch.setattr(IWSA, "forward", broken)
    fuse(IWSA(8, 2))
    assert "ZeroDivisionError: half an edit" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what fuse works with
def test_whatever_the_callers_modes_and_defaults():
    """Default device and dtype, autocast, no gradients, inference; and the random state stays as it was."""
    contexts = [torch.device("meta"), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)]
    for context in contexts:
        model, before = small(), torch.get_rng_state()
        with context:
            fuse(model)
        assert {FusedIWSA, FusedSSA} < set(kinds(model))
        assert torch.equal(torch.get_rng_state(), before)
    for dtype in (torch.float64, torch.bfloat16):
        model = small()
        torch.set_default_dtype(dtype)
        try:
            fuse(model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {FusedIWSA, FusedSSA} < set(kinds(model))


def test_copies_averages_and_pickles_are_fused_too():
    model, x = fuse(small()).eval(), torch.randn(1, 3, 40, 40)
    before, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), average.module, torch.load(file, weights_only=False)):
        assert kinds(other) == kinds(model)
        assert torch.equal(other(x), before)


def test_checkpointing_gives_the_same_gradients():
    model, x = fuse(small()).double(), torch.randn(2, 3, 123, 110, dtype=torch.float64)

    def gradients():
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters()])

    expected = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)


def train_on_one_rank(rank, folder):
    """One backward pass under DDP, and under FSDP with fuse called before and after; saves LIM's gradients."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[rank::2]
    gradients = {}
    for name in ("DDP", "fuse, then FSDP", "FSDP, then fuse"):
        model = small().double()
        if name != "FSDP, then fuse":
            fuse(model)
        call = DistributedDataParallel(model) if name == "DDP" else fully_shard(model)
        fuse(model)
        call(x).square().sum().backward()
        assert {FusedIWSA, FusedSSA} < set(kinds(model))
        grad = model.stages[0].blocks[0].attn.lim.weight.grad
        gradients[name] = grad if name == "DDP" else grad.full_tensor()
    torch.save(gradients, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_and_fsdp_on_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(train_on_one_rank, (str(tmp_path),), nprocs=2)
    model = small().double()
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (model(x).square().sum() / 2).backward()                        # both average over the ranks
    expected = model.stages[0].blocks[0].attn.lim.weight.grad
    for rank in (0, 1):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        assert len(gradients) == 3
        for got in gradients.values():
            torch.testing.assert_close(got, expected)


@on_devices
def test_compile(device):
    model = nn.Sequential(IWSA(16, 2, window=3), SSA(16, 2, 1.25, 1 / 4)).to(device)
    x = torch.randn(2, 30, 29, 16, device=device, requires_grad=True)
    fuse(model)
    out, expected = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x), model(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected)))
    torch._dynamo.reset()


@on_devices
def test_export_with_a_dynamic_batch(device):
    model = fuse(nn.Sequential(IWSA(16, 2, window=3), SSA(16, 2, 1.25, 1 / 4)).to(device)).eval()
    x = torch.randn(2, 30, 29, 16, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("scaled_dot_product_attention" in name for name in operators)
    assert device not in kernels.devices or any("scalablevit" in name for name in operators)
    larger = torch.randn(5, 30, 29, 16, device=device)
    torch.testing.assert_close(program.module()(larger), model(larger))


# ------------------------------------------------------------------------------------------------ without a compiler
WITHOUT = """
import torch, scalablevit, scalablevit_kernels
from scalablevit_kernels import FusedIWSA, FusedSSA, fuse
torch.manual_seed(0)
model = torch.nn.Sequential(scalablevit.IWSA(8, 2, window=12), scalablevit.SSA(8, 2))
x = torch.randn(2, 13, 20, 8)
before = model(x)
fuse(model)
assert [type(layer) for layer in model] == [FusedIWSA, FusedSSA]
assert scalablevit_kernels.devices == ()
torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
with torch.profiler.profile() as profile:
    model[0](x)
assert any("scaled_dot_product" in event.key for event in profile.key_averages())
"""


@pytest.mark.slow
@pytest.mark.parametrize("note", ["there is no C++ compiler c++", None])
def test_without_the_compiled_part(tmp_path, note):
    """Installed without a compiler, or with a compiled part that cannot be loaded: attention is PyTorch's."""
    package = tmp_path / "scalablevit_kernels"
    package.mkdir()
    for file in pathlib.Path(kernels.__file__).parent.glob("*.py"):
        shutil.copy(file, package)
    (package / "_C.py").write_text("raise ImportError('undefined symbol: built for another PyTorch')")
    if note is not None:                                            # written by setup.py
        (package / "not_built.txt").write_text(note + "\n")
    root = pathlib.Path(scalablevit.__file__).parent
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert (note or "undefined symbol") in lines[0]
    assert "pip install --no-build-isolation" in lines[0]
