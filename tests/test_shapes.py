"""Input and output shapes, the head, weight decay, stochastic depth, initialization."""
import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from helpers import architectures, random_tokens
from scalablevit import ATTENTION, Block, PEG, ScalableViT, WSA, scalablevit_tiny


@given(architectures(), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70))
def test_any_architecture_takes_any_size(kwargs, B, H, W):
    model = ScalableViT(**kwargs).eval()
    images = torch.randn(B, kwargs["in_chans"], H, W)
    with torch.no_grad():
        maps, out = model.forward_features(images), model(images)
    expected = [(B, kwargs["dim"] * 2 ** i, math.ceil(H / 4 / 2 ** i), math.ceil(W / 4 / 2 ** i))
                for i in range(len(kwargs["depths"]))]
    assert [feature_map.shape for feature_map in maps] == expected
    assert model.channels == [shape[1] for shape in expected]
    assert model.num_features == model.channels[-1]
    assert out.shape == (B, kwargs["num_classes"] or model.num_features)    # 0: the pooled features
    assert out.isfinite().all()


@settings(max_examples=15)
@given(st.integers(1, 130), st.integers(1, 130))
@example(1, 1)
@example(1, 130)
def test_tiny_takes_any_size_and_pools_the_normalized_last_map(H, W):
    model, images = scalablevit_tiny(num_classes=0).double().eval(), random_tokens(2, 3, H, W)
    with torch.no_grad():
        maps, pooled = model.forward_features(images), model(images)
    assert [m.shape[2:] for m in maps] == [(math.ceil(H / s), math.ceil(W / s)) for s in (4, 8, 16, 32)]
    centred = maps[-1] - maps[-1].mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(pooled, normed.mean(dim=(2, 3)))


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_batch_may_be_empty_and_tensors_without_memory(kind):
    """Fake tensors, as tools that plan memory use them."""
    model = scalablevit_tiny(num_classes=5, pattern=(kind, kind))
    assert model(torch.zeros(0, 3, 40, 36)).shape == (0, 5)
    with FakeTensorMode():
        model = scalablevit_tiny(drop_path_rate=0.3, pattern=(kind, kind))
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("hidden", [None, 32])
def test_reset_classifier_keeps_the_kind_of_head(hidden):
    model = scalablevit_tiny(num_classes=10, head_hidden=hidden).double()
    images, before = torch.randn(2, 3, 32, 32, dtype=torch.float64), model.head
    for classes in (7, 0, 3):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model.head is not before
        assert model(images).shape == (2, classes or model.num_features)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    last = model.head
    if hidden is not None:
        assert [type(layer) for layer in model.head] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
        assert model.head[0].out_features == 32
        last = model.head[3]
    assert last.weight.shape == (3, hidden or 192)
    assert last.bias.eq(0).all()
    assert 0.015 < last.weight.std() < 0.025


@given(architectures(), st.sampled_from([0.0, 0.2, 0.5]))
def test_layers_are_what_the_arguments_say(kwargs, rate):
    """Attention alternates; stochastic depth rises linearly; biases, norms and the PEG do not decay."""
    model = ScalableViT(**kwargs, drop_path_rate=rate)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for stage, depth in zip(model.stages, kwargs["depths"]):
        kinds = [type(block.attn).__name__.lower() for block in stage.blocks]
        assert kinds == [kwargs["pattern"][j % 2] for j in range(depth)]
        assert isinstance(stage.peg, PEG) == kwargs["peg"]
    rates = [rate * i / max(len(blocks) - 1, 1) for i in range(len(blocks))]
    assert [block.drop_path_rate for block in blocks] == pytest.approx(rates)
    exempt = {f"{name}.{kind}" for name, module in model.named_modules()
              for kind, _ in module.named_parameters(recurse=False)
              if kind == "bias" or isinstance(module, nn.LayerNorm) or name.endswith("peg.conv")}
    assert model.no_weight_decay() == exempt


def block_with(drop_path_rate):
    return Block(WSA(4, 1, 2), 4, mlp_ratio=1.0, drop_path_rate=drop_path_rate)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(p):
    n = 40_000
    out = block_with(p).train().drop_path(torch.ones(n, 2, 1, 3)).reshape(n, 6)
    assert (out == out[:, :1]).all()                                # a sample is kept or dropped as a whole
    kept = out[:, 0] > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    spread = 5 * math.sqrt(p / (1 - p) / n)                         # five standard deviations of the mean
    assert abs(kept.float().mean() - (1 - p)) < spread * (1 - p)
    for block in (block_with(0.0).train(), block_with(p).eval()):
        assert torch.equal(block.drop_path(out), out)


def test_drop_path_drops_the_branch_and_keeps_the_skip_connection():
    """The two branches are dropped independently: with p = 1/2, a quarter of the samples pass unchanged."""
    block, x = block_with(0.5).train(), torch.randn(4000, 2, 2, 4)
    unchanged = (block(x) == x).flatten(1).all(dim=1).float().mean()
    assert 0.22 < unchanged < 0.28
    assert not (block.eval()(x) == x).flatten(1).all(dim=1).any()


def test_the_published_initialization():
    """Normal with std 0.02 (linear) and sqrt(2 / fan out) (convolution), biases 0, norms 1 and 0."""
    for name, module in scalablevit_tiny(dim=64, heads=(2, 4, 8, 16), head_hidden=128).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all(), name
            assert module.eps == (1e-5 if name.endswith("attn.norm") else 1e-6), name
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.Conv2d)):
            assert module.bias.eq(0).all(), name
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            w, std = module.weight.detach(), 0.02
            if isinstance(module, nn.Conv2d):
                out_channels, _, k, _ = w.shape
                std = math.sqrt(2 / (k * k * out_channels / module.groups))
            n = w.numel()
            assert abs(w.mean()) < 5 * std / math.sqrt(n), name
            assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * n), name
            within = (w.abs() < std).double().mean()                # 68 % for a normal distribution
            assert abs(within - 0.6827) < 5 * math.sqrt(0.22 / n), name
