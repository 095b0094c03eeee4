"""The same network under compile, export, autocast, other dtypes and layouts, checkpointing, DDP, copies."""
import copy
import io

import pytest
import torch
import torch.distributed.nn                    # before init_process_group: see train_minimal.py
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from helpers import architectures
from scalablevit import Block, ScalableViT

ALL_KINDS = [("iwsa", "ssa"), ("lem", "swsa")]                      # wsa is the base class of iwsa, lem and swsa


def small(**kwargs):
    """Two stages with every kind of layer: windows cut off by the border, r_n < 1 and r_n = 1."""
    torch.manual_seed(0)
    return ScalableViT(**dict(dim=8, depths=(2, 2), heads=(1, 2), rc=(1.25, 1.0), rn=(1 / 4, 1), window=3,
                              num_classes=5, head_hidden=16) | kwargs)


def images(B=2, H=36, W=29, dtype=torch.float32, seed=1):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_and_gradients(model, x, call=None):
    model.zero_grad()
    out = (model if call is None else call)(x)
    loss = F.cross_entropy(out.float() if out.dtype == torch.bfloat16 else out, torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ compile and export
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_trace():
    model, x = small().eval(), images()
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ALL_KINDS)
def test_compile_in_one_graph(pattern):
    """fullgraph=True raises on graph breaks; the loss and all gradients stay the same."""
    model, x = small(pattern=pattern).double(), images(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = loss_and_gradients(model, x)
    torch.testing.assert_close(loss_and_gradients(model, x, compiled), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile_with_inductor():
    """The default backend, on one stage with every kind of layer, without gradients.

    Vector instructions are turned off, as probing the compiler for them takes half of the time.
    """
    model = small(depths=(2,), heads=(2,), rc=(1.25,), rn=(1 / 4,), head_hidden=None).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, options={"cpp.vec_isa_ok": False})
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("pattern", ALL_KINDS)
def test_export_with_a_dynamic_batch(pattern):
    model = small(pattern=pattern).eval()
    program = torch.export.export(model, (images(3),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    for B in (2, 3, 8):
        torch.testing.assert_close(program.module()(images(B)), model(images(B)))


@pytest.mark.slow
def test_export_with_dynamic_sizes():
    """Batch, H and W larger and smaller than when traced, divisible by 7 and the reductions or not."""
    model, Dim = small(depths=(2, 2), heads=(2, 4), rc=(1.25, 1.0), rn=(1 / 4, 1)).eval(), torch.export.Dim
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("H", min=33, max=2048), 3: Dim("W", min=33, max=2048)}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (torch.randn(2, 3, 61, 70),), dynamic_shapes=(sizes,),
                                      prefer_deferred_runtime_asserts_over_guards=True)
    for B, H, W in ((1, 56, 56), (2, 61, 70), (3, 64, 33), (1, 130, 97)):
        x = torch.randn(B, 3, H, W)
        torch.testing.assert_close(program.module()(x), model(x))


# ------------------------------------------------------------------------------------------------ numbers and layouts
@pytest.mark.parametrize("pattern", ALL_KINDS)
def test_autocast_to_bfloat16_stays_close(pattern):
    model, x = small(pattern=pattern), images(8)
    loss, gradients = loss_and_gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    loss_bf16, gradients_bf16 = loss_and_gradients(model, x, call)
    torch.testing.assert_close(loss_bf16, loss, rtol=0.02, atol=0.02)
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients_bf16, gradients))
    assert a.isfinite().all() and F.cosine_similarity(a, b, dim=0) > 0.99


@settings(max_examples=15)
@given(architectures(), st.integers(1, 50), st.integers(1, 50))
def test_float64_and_float32_agree(kwargs, H, W):
    model, x = ScalableViT(**kwargs).eval(), torch.randn(2, kwargs["in_chans"], H, W)
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@settings(max_examples=15)
@given(architectures(), st.integers(1, 50), st.integers(1, 50))
def test_channels_last_input_gives_the_same(kwargs, H, W):
    model, x = ScalableViT(**kwargs).eval(), torch.randn(2, kwargs["in_chans"], H, W)
    with torch.no_grad():
        other = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(other, model(x), rtol=1e-4, atol=1e-5)


def test_moving_to_another_dtype_and_back():
    model, x = small(), images()
    before = model(x)
    model.to(torch.float64)
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float64}
    assert model(x.double()).dtype == torch.float64
    assert torch.equal(model.to(torch.float32)(x), before)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(x.bfloat16()).float(), before, rtol=0.05, atol=0.05)


def test_moving_to_another_device():
    """To "meta": all tensors move with the model, and masks are created on its device."""
    model = small(pattern=("swsa", "lem")).to("meta")
    assert model(images().to("meta")).device.type == "meta"
    model.reset_classifier(7)
    assert model(images().to("meta")).shape == (2, 7) and model.head[0].weight.device.type == "meta"


# ------------------------------------------------------------------------------------------------ checkpointing
def test_gradient_checkpointing_gives_the_same_gradients():
    """With stochastic depth, which must drop the same samples when a block is recomputed."""
    model, x = small(drop_path_rate=0.5).double().train(), images(8, dtype=torch.float64)
    runs = [0]
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))

    def step():
        torch.manual_seed(3)
        runs[0] = 0
        return loss_and_gradients(model, x), runs[0]

    expected, once = step()
    model.set_grad_checkpointing()
    checkpointed, twice = step()
    torch.testing.assert_close(checkpointed, expected)
    assert (once, twice) == (4, 8)                                                      # every block was recomputed
    with torch.no_grad():
        runs[0] = 0
        model(x)
    assert runs[0] == 4
    model.set_grad_checkpointing(False)
    assert step()[1] == 4


# ------------------------------------------------------------------------------------------------ DDP
DDP_CASES = [(("iwsa", "ssa"), False), (("lem", "swsa"), True)]                         # pattern, checkpointing


def train_on_one_rank(rank, ranks, folder):
    """Three steps on this rank's share of every batch; saves parameters and gradients of each case."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for i, (pattern, checkpointing) in enumerate(DDP_CASES):
        model = small(pattern=pattern).double()
        model.set_grad_checkpointing(checkpointing)
        train(model, DistributedDataParallel(model), lambda batch: batch[rank::ranks])  # without find_unused_parameters
        torch.save({name: (p.detach(), p.grad) for name, p in model.named_parameters()}, f"{folder}/{i}.{rank}.pt")
    distributed.destroy_process_group()


def train(model, call, share):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(4, dtype=torch.float64, seed=step), torch.arange(4)
        F.cross_entropy(call(share(x)), share(y)).backward()
        optimizer.step()


@pytest.mark.slow
def test_ddp_on_two_processes_equals_one(tmp_path):
    """Two ranks with half of each batch end with the same parameters as one process with whole batches."""
    multiprocessing.spawn(train_on_one_rank, (2, str(tmp_path)), nprocs=2)
    for i, (pattern, _) in enumerate(DDP_CASES):
        first, second = (torch.load(tmp_path / f"{i}.{rank}.pt") for rank in (0, 1))
        alone = small(pattern=pattern).double()
        train(alone, alone, lambda batch: batch)
        for name, p in alone.named_parameters():
            (value, gradient), (other, other_gradient) = first[name], second[name]
            assert gradient is not None and gradient.ne(0).any(), name
            assert torch.equal(value, other) and torch.equal(gradient, other_gradient), name
            torch.testing.assert_close((value, gradient), (p.detach(), p.grad), rtol=1e-8, atol=1e-10)


@settings(max_examples=15)
@given(architectures())
def test_every_parameter_gets_a_gradient(kwargs):
    """So DDP works without find_unused_parameters for every architecture."""
    model = ScalableViT(**kwargs).train()
    model(torch.randn(2, kwargs["in_chans"], 40, 33)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ------------------------------------------------------------------------------------------------ copies and states
def test_a_deepcopy_is_independent():
    model, x = small(), images()
    model(x).sum().backward()
    other, before = copy.deepcopy(model), model(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.reset_classifier(2)
    other.set_grad_checkpointing()
    assert torch.equal(model(x), before) and not any(stage.grad_checkpointing for stage in model.stages)


@settings(max_examples=15)
@given(architectures())
def test_a_state_dict_survives_saving_and_loading(kwargs):
    torch.manual_seed(0)
    model, file = ScalableViT(**kwargs).eval(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other, x = ScalableViT(**kwargs).eval(), torch.randn(1, kwargs["in_chans"], 40, 33)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    assert set(model.state_dict()) == set(dict(model.named_parameters()))               # nothing but parameters


def test_train_and_eval_differ_only_by_stochastic_depth():
    model, x = small(drop_path_rate=0.9), images(8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert torch.equal(small(drop_path_rate=0).train()(x), model(x))
