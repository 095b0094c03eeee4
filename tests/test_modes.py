"""The same network under compile, export, autocast, other dtypes and layouts, checkpointing, DDP, copies.

Every kind of layer, and a fused model if the extension is installed.
"""
import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import distributed, multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from helpers import architectures, random_tokens, small
from scalablevit import Block, ScalableViT

try:
    from scalablevit_kernels import devices, fuse
except ModuleNotFoundError:
    fuse = None


def fused(**changes):
    return fuse(small(**changes))


needs_fuse = pytest.mark.skipif(fuse is None, reason="the extension is not installed")
NETWORKS = [small, partial(small, pattern=("lem", "swsa")), pytest.param(fused, marks=needs_fuse)]
networks = pytest.mark.parametrize("network", NETWORKS, ids=["iwsa and ssa", "lem and swsa", "fused"])


def images(B=2, H=100, W=93, dtype=torch.float32, seed=1):
    """Maps of 25 x 24 and 13 x 12 tokens: 156 keys in both stages."""
    return random_tokens(B, 3, H, W, seed=seed).to(dtype)


def loss_and_gradients(model, x, call=None):
    model.zero_grad()
    out = model(x) if call is None else call(x)
    loss = F.cross_entropy(out.to(x.dtype), torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@networks
def test_compile_in_one_graph(network):
    """fullgraph=True raises on graph breaks; the loss and all gradients stay the same."""
    model, x = network().double(), images(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(model, x, compiled), loss_and_gradients(model, x))
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile_with_inductor():
    """The default backend, on one stage with both kinds of layer, without gradients.

    Vector instructions are turned off, as probing the compiler for them takes half of the time.
    """
    model = small(depths=(2,), heads=(2,), rc=(1.25,), rn=(1 / 4,), head_hidden=None).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, options={"cpp.vec_isa_ok": False})
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@networks
def test_export_with_a_dynamic_batch(network):
    model, batch = network().eval(), torch.export.Dim("batch")
    program = torch.export.export(model, (images(3),), dynamic_shapes={"images": {0: batch}})
    for B in (2, 3, 8):
        torch.testing.assert_close(program.module()(images(B)), model(images(B)))
    operators = " ".join(str(node.target) for node in program.graph.nodes)
    assert ("scaled_dot_product_attention" in operators) == (network is fused)
    assert ("scalablevit" in operators) == (network is fused and "cpu" in devices)


@pytest.mark.slow
def test_export_with_dynamic_sizes():
    """Batch, H and W larger and smaller than when traced, divisible by 7 and the reductions or not."""
    model, Dim = small(heads=(2, 4)).eval(), torch.export.Dim
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("H", min=33, max=2048), 3: Dim("W", min=33, max=2048)}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (torch.randn(2, 3, 61, 70),), dynamic_shapes=(sizes,),
                                      prefer_deferred_runtime_asserts_over_guards=True)
    for B, H, W in ((1, 56, 56), (2, 61, 70), (3, 64, 33), (1, 130, 97)):
        x = torch.randn(B, 3, H, W)
        torch.testing.assert_close(program.module()(x), model(x))


@networks
def test_autocast_to_bfloat16_stays_close(network):
    model, x = network(), images(8)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert call(x).dtype == torch.bfloat16
    (loss, gradients), (loss_bf16, gradients_bf16) = (loss_and_gradients(model, x, c) for c in (None, call))
    torch.testing.assert_close(loss_bf16, loss, rtol=0.02, atol=0.02)
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients_bf16, gradients))
    assert F.cosine_similarity(a, b, dim=0) > 0.99                  # false for NaN


@settings(max_examples=15)
@given(architectures(), st.integers(1, 50), st.integers(1, 50))
def test_other_dtypes_layouts_and_saved_weights_give_the_same(kwargs, H, W):
    """Another model with the saved weights (only parameters), channels-last images, float64."""
    torch.manual_seed(0)
    model, other = ScalableViT(**kwargs).eval(), ScalableViT(**kwargs).eval()
    x, file = torch.randn(2, kwargs["in_chans"], H, W), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    with torch.no_grad():
        out = model(x)
        assert torch.equal(other(x), out)
        last = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, out, rtol=1e-4, atol=1e-5)
        double = other.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(out, double.float(), rtol=1e-3, atol=1e-4)
    model.train()(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []       # for DDP


@networks
def test_moving_to_another_dtype_and_back_and_to_a_device(network):
    """To "meta": all tensors move with the model, and masks are created on its device."""
    model, x = network(), images()
    before = model(x)
    model.to(torch.float64)
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float64}
    assert torch.equal(model.to(torch.float32)(x), before)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(x.bfloat16()).float(), before, rtol=0.05, atol=0.05)
    model.to("meta").reset_classifier(7)
    out = model(x.bfloat16().to("meta"))
    assert out.shape == (2, 7)
    assert out.is_meta


@networks
def test_gradient_checkpointing_gives_the_same_gradients(network):
    """With stochastic depth, which must drop the same samples when a block is recomputed."""
    model, x, runs = network(drop_path_rate=0.5).double().train(), images(8, dtype=torch.float64), []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: runs.append(1))

    def step():
        torch.manual_seed(3)
        runs.clear()
        return loss_and_gradients(model, x), len(runs)

    expected, once = step()
    model.set_grad_checkpointing()
    checkpointed, twice = step()
    torch.testing.assert_close(checkpointed, expected)
    assert once == 4
    assert twice == 8                                               # every block was recomputed
    with torch.no_grad():
        runs.clear()
        model(x)
    assert len(runs) == 4
    model.set_grad_checkpointing(False)
    assert step()[1] == 4


def wrapped(name):
    """A model, and what is called in its place; DDP works without find_unused_parameters."""
    model = small(pattern=("lem", "swsa") if name == "other layers" else ("iwsa", "ssa")).double()
    if name in ("fused", "fuse, then FSDP"):
        fuse(model)
    model.set_grad_checkpointing(name == "other layers")
    call = fully_shard(model) if "FSDP" in name else DistributedDataParallel(model)
    if name == "FSDP, then fuse":
        fuse(model)
    assert ("fuse" in name) == ("FusedIWSA" in {type(layer).__name__ for layer in model.modules()})
    return model, call


def train(model, call, share):
    """Three steps; returns parameters and gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(4, dtype=torch.float64, seed=step), torch.arange(4)
        F.cross_entropy(call(share(x)), share(y)).backward()
        optimizer.step()
    return {name: [t.full_tensor() if isinstance(t, DTensor) else t for t in (p.detach(), p.grad)]
            for name, p in model.named_parameters()}


def train_on_one_rank(rank, names, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {name: train(*wrapped(name), lambda batch: batch[rank::2]) for name in names}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_ddp_or_fsdp_equal_one(tmp_path):
    """Two ranks with half of each batch end with the same parameters as one process with whole batches."""
    names = ["plain", "other layers"] + ["fused", "fuse, then FSDP", "FSDP, then fuse"] * (fuse is not None)
    multiprocessing.spawn(train_on_one_rank, (names, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        alone = small(pattern=("lem", "swsa") if name == "other layers" else ("iwsa", "ssa")).double()
        expected = train(alone, alone, lambda batch: batch)
        torch.testing.assert_close(first[name], expected, rtol=1e-8, atol=1e-10)


@networks
def test_copies_averages_and_pickles_are_alike_and_independent(network):
    model, x, file = network().eval(), images(), io.BytesIO()
    model(x).sum().backward()
    before, average = model(x), torch.optim.swa_utils.AveragedModel(model)
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), average.module, torch.load(file, weights_only=False)):
        assert [type(layer) for layer in other.modules()] == [type(layer) for layer in model.modules()]
        assert torch.equal(other(x), before)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        other.reset_classifier(2)
        other.set_grad_checkpointing()
    assert torch.equal(model(x), before)
    assert not any(stage.grad_checkpointing for stage in model.stages)
