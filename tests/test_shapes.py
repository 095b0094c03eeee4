"""Input and output shapes, the head, weight decay, stochastic depth, initialization."""
import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from helpers import architectures
from scalablevit import ATTENTION, Block, PEG, PatchEmbed, ScalableViT, WSA, scalablevit_tiny


@given(architectures(), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70))
def test_any_architecture_takes_any_size(kwargs, B, H, W):
    model = ScalableViT(**kwargs).eval()
    images = torch.randn(B, kwargs["in_chans"], H, W)
    with torch.no_grad():
        maps, out = model.forward_features(images), model(images)
    for i, feature_map in enumerate(maps):
        stride = 4 * 2 ** i
        assert feature_map.shape == (B, kwargs["dim"] * 2 ** i, math.ceil(H / stride), math.ceil(W / stride))
    assert len(maps) == len(kwargs["depths"])
    width = kwargs["num_classes"] or kwargs["dim"] * 2 ** (len(maps) - 1)               # 0 classes: the pooled features
    assert out.shape == (B, width) and out.isfinite().all()


@settings(max_examples=15)
@given(st.integers(1, 130), st.integers(1, 130))
@example(1, 1)
@example(1, 130)
def test_the_default_architecture_takes_any_size(H, W):
    model = scalablevit_tiny(num_classes=0).eval()
    with torch.no_grad():
        maps = model.forward_features(torch.randn(1, 3, H, W))
    assert [tuple(m.shape) for m in maps] == [(1, 24 * 2 ** i, math.ceil(H / s), math.ceil(W / s))
                                              for i, s in enumerate((4, 8, 16, 32))]


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_batch_may_be_empty(kind):
    assert scalablevit_tiny(num_classes=5, pattern=(kind, kind))(torch.zeros(0, 3, 40, 36)).shape == (0, 5)


def test_pooled_features_are_the_mean_of_the_normalized_last_map():
    model = scalablevit_tiny(num_classes=0).double().eval()
    images = torch.randn(2, 3, 70, 40, dtype=torch.float64)
    last = model.forward_features(images)[-1]
    centred = last - last.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model(images), normed.mean(dim=(2, 3)))


@pytest.mark.parametrize("hidden", [None, 32])
def test_reset_classifier_keeps_the_kind_of_head(hidden):
    model = scalablevit_tiny(num_classes=10, head_hidden=hidden).double()
    images, before = torch.randn(2, 3, 32, 32, dtype=torch.float64), model.head
    for classes in (7, 0, 3):
        model.reset_classifier(classes)
        assert model.num_classes == classes and model.head is not before
        assert model(images).shape == (2, classes or model.num_features)
    assert type(model.head) is type(before)
    fresh = scalablevit_tiny(num_classes=3, head_hidden=hidden)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert all(p.dtype == torch.float64 for p in model.parameters())
    last = model.head if hidden is None else model.head[-1]
    assert last.bias.eq(0).all() and 0.015 < last.weight.std() < 0.025


@given(architectures(), st.integers(0, 5), st.sampled_from([0.0, 0.3]))
def test_config_rebuilds_the_same_network(kwargs, classes, rate):
    """Also after reset_classifier: the same parameters, and with their values the same output."""
    model = ScalableViT(**kwargs, drop_path_rate=rate).eval()
    model.reset_classifier(classes)
    again = ScalableViT(**model.config).eval()
    assert again.config == model.config == kwargs | {"num_classes": classes, "drop_path_rate": rate}
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, kwargs["in_chans"], 40, 33)
    assert torch.equal(again(images), model(images))


def test_the_two_kinds_of_head():
    plain, published = (scalablevit_tiny(num_classes=7, head_hidden=hidden) for hidden in (None, 32))
    assert isinstance(plain.head, nn.Linear)
    assert [type(layer) for layer in published.head] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert published.head[0].out_features == published.head[3].in_features == 32


@given(architectures())
def test_no_weight_decay_names_biases_norms_and_the_peg(kwargs):
    model = ScalableViT(**kwargs)
    expected = set()
    for name, module in model.named_modules():
        for kind, _ in module.named_parameters(recurse=False):
            inside_peg = name.endswith("peg.conv")
            if kind == "bias" or isinstance(module, nn.LayerNorm) or inside_peg:
                expected.add(f"{name}.{kind}")
    assert set(model.no_weight_decay()) == expected


# ------------------------------------------------------------------------------------------------ order in a stage
@given(architectures())
def test_channels_are_the_maps_channels(kwargs):
    model = ScalableViT(**kwargs)
    with torch.no_grad():
        maps = model.forward_features(torch.zeros(1, kwargs["in_chans"], 32, 32))
    assert model.channels == [feature_map.shape[1] for feature_map in maps]
    assert model.num_features == model.channels[-1]


def test_a_model_can_be_built_without_memory():
    """With fake tensors, as tools that plan memory do."""
    with FakeTensorMode():
        model = scalablevit_tiny(drop_path_rate=0.3)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


def test_a_stage_is_embedding_block_peg_blocks():
    """The modules are called in the order of Figure 2."""
    model, called = scalablevit_tiny(), []
    for name, module in model.named_modules():
        if isinstance(module, (PatchEmbed, Block, PEG)):
            module.register_forward_hook(lambda m, a, out, name=name: called.append(name.split(".", 1)[1]))
    model(torch.randn(1, 3, 64, 64))
    assert called[:4] == ["0.embed", "0.blocks.0", "0.peg", "0.blocks.1"]
    assert called[8:14] == ["2.embed", "2.blocks.0", "2.peg", "2.blocks.1", "2.blocks.2", "2.blocks.3"]


@given(architectures())
def test_attention_kinds_alternate_in_each_stage(kwargs):
    model = ScalableViT(**kwargs)
    for stage, depth in zip(model.stages, kwargs["depths"]):
        kinds = [type(block.attn).__name__.lower() for block in stage.blocks]
        assert kinds == [kwargs["pattern"][j % 2] for j in range(depth)]
        assert isinstance(stage.peg, PEG) == kwargs["peg"]


# ------------------------------------------------------------------------------------------------ stochastic depth
@given(architectures(), st.sampled_from([0.0, 0.2, 0.5]))
def test_drop_path_rises_linearly_over_all_blocks(kwargs, rate):
    model = ScalableViT(**kwargs, drop_path_rate=rate)
    rates = [block.drop_path_rate for stage in model.stages for block in stage.blocks]
    blocks = len(rates)
    assert rates == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)] if blocks > 1 else [0])


def block_with(drop_path_rate):
    return Block(WSA(4, 1, 2), 4, mlp_ratio=1.0, drop_path_rate=drop_path_rate)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(p):
    n = 40_000
    out = block_with(p).train().drop_path(torch.ones(n, 2, 1, 3)).reshape(n, 6)
    assert (out == out[:, :1]).all()                                # a sample is kept or dropped as a whole
    kept = out[:, 0] > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    spread = 5 * math.sqrt(p / (1 - p) / n)                     # five standard deviations of the mean
    assert abs(out.mean() - 1) < spread and abs(kept.float().mean() - (1 - p)) < spread


def test_drop_path_is_the_identity_in_eval_and_at_rate_0():
    x = torch.randn(5, 2, 2, 3)
    assert torch.equal(block_with(0.9).eval().drop_path(x), x)
    assert torch.equal(block_with(0.0).train().drop_path(x), x)


def test_drop_path_drops_the_branch_and_keeps_the_skip_connection():
    """The two branches are dropped independently: with p = 1/2, a quarter of the samples pass unchanged."""
    block, x = block_with(0.5).train(), torch.randn(4000, 2, 2, 4)
    unchanged = (block(x) == x).flatten(1).all(dim=1).float().mean()
    assert 0.22 < unchanged < 0.28
    assert not (block.eval()(x) == x).flatten(1).all(dim=1).any()


# ------------------------------------------------------------------------------------------------ initialization
def test_the_published_initialization():
    """Normal with std 0.02 (linear) and sqrt(2 / fan out) (convolution), biases 0, norms 1 and 0."""
    for name, module in scalablevit_tiny(dim=64, heads=(2, 4, 8, 16), head_hidden=128).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias.eq(0).all(), name
            w, std = module.weight.detach(), 0.02
            if isinstance(module, nn.Conv2d):
                out_channels, _, k, _ = w.shape
                std = math.sqrt(2 / (k * k * out_channels / module.groups))
            n = w.numel()
            assert abs(w.mean()) < 5 * std / math.sqrt(n), name
            assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs((w.abs() < std).double().mean() - 0.6827) < 5 * math.sqrt(0.22 / n), name  # 68 % within 1 std


def test_layer_norms_have_the_published_eps():
    for name, module in scalablevit_tiny(head_hidden=16).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name.endswith("attn.norm") else 1e-6), name
