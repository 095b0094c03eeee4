"""Parameter names and outputs of the published model, and what `load_model` accepts.

`official_s.json` has the parameter names and shapes of the published ScalableViT-S, the root mean square of
every block's output (8 decimals) and the logits (9 decimals), computed in float64 by the published code.
Weights and input are not stored: `fill` generates them from their names.
"""
import io
import json
import math
import os
import pickle
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import scalablevit
from helpers import architectures, small
from scalablevit import ScalableViT, convert_official, load_model, scalablevit_s, scalablevit_tiny

OFFICIAL = json.loads((Path(__file__).parent / "official_s.json").read_text())
LOGITS = torch.tensor(OFFICIAL["logits"], dtype=torch.float64)


def fill(name, shape):
    """Uniform in [-1, 1): splitmix64 of (crc32(name) << 32) + 0, 1, 2, ..."""
    def u64(number):
        return np.uint64(number)

    with np.errstate(over="ignore"):                                # arithmetic modulo 2^64 is intended
        z = u64(zlib.crc32(name.encode()) << 32) + np.arange(np.prod(shape), dtype=np.uint64)
        z += u64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
        z ^= z >> u64(31)
    return torch.from_numpy((z >> u64(11)).astype(np.float64) * 2.0 ** -52 - 1).reshape(shape)


def weight(name, shape):
    u = fill(name, shape)
    if len(shape) == 1:
        return (1 if name.endswith("weight") else 0) + 0.1 * u
    return u * (3 / np.prod(shape[1:])) ** 0.5


@pytest.fixture(scope="module")
def published():
    return {name: weight(name, shape) for name, shape in OFFICIAL["state_dict"].items()}


def saved(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("key, prefix", [("state_dict", "module."), ("model", "_orig_mod.module.")])
def test_weights_are_found_wherever_they_stand(published, key, prefix, tmp_path):
    content = {key: {prefix + name: tensor for name, tensor in published.items()}, "args": Namespace(lr=1)}
    converted = convert_official(published)
    torch.testing.assert_close(dict(load_model(saved(content, tmp_path)).state_dict()), converted, rtol=0, atol=0)


def test_outputs_of_the_published_model(published, tmp_path):
    """Logits to 1e-9, every block's output to 1e-8; in eval mode, in the weights' float64."""
    model, rms = load_model(saved(published, tmp_path)), {}
    assert not model.training
    assert model.config == scalablevit_s().config
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            block.register_forward_hook(lambda module, args, out, name=f"stages.{i}.{j}":
                                        rms.update({name: out.square().mean().sqrt().item()}))
    with torch.no_grad():
        logits = model(fill("input", OFFICIAL["input_shape"]))
    torch.testing.assert_close(logits, LOGITS, rtol=0, atol=1e-9)
    assert rms == pytest.approx(OFFICIAL["block_output_rms"], rel=0, abs=1e-8)


def test_a_linear_head_means_r_c_in_all_stages(published, tmp_path):
    """As in another published S."""
    weights = {name: tensor for name, tensor in published.items() if not name.startswith("head.")}
    weights |= {"head.weight": weight("head.weight", (1000, 512)), "head.bias": weight("head.bias", (1000,))}
    model = load_model(saved(weights, tmp_path))
    assert model.config == scalablevit_s().config | dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25))
    assert torch.equal(model.head.weight, weights["head.weight"])
    assert torch.equal(model.head.bias, weights["head.bias"])
    assert model.stages[3].blocks[1].attn.scale == (1.25 * 512 / 16) ** -0.5


@pytest.mark.parametrize("key", [
    "stages.0.0.attn.relative_position_bias_table", "patch_embeds.0.proj.gamma", "cls_token", "head.2.weight",
    "stages.0.blocks.0.norm1.weight", "module.norm.weight"])
def test_an_unknown_name_is_rejected(published, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert_official(published | {key: torch.zeros(1)})


@pytest.mark.parametrize("build", ["scalablevit_tiny", "scalablevit_s", "scalablevit_b", "scalablevit_l"])
def test_a_state_dict_tells_its_size(build, tmp_path):
    """And its number of classes; the dtype becomes float32."""
    model = getattr(scalablevit, build)(num_classes=3, depths=(2, 2, 2, 2)).half()
    again = load_model(saved(model.state_dict(), tmp_path), depths=(2, 2, 2, 2))
    assert again.config == model.config
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    torch.testing.assert_close(dict(again.state_dict()), weights, rtol=0, atol=0)


@given(kwargs=architectures(), classes=st.integers(0, 5), rate=st.sampled_from([0.0, 0.3]),
       prefix=st.sampled_from(["", "module.", "module._orig_mod."]))
def test_a_checkpoint_of_any_architecture_loads(kwargs, classes, rate, prefix):
    """Its config says which, also after reset_classifier; only the weights may have a prefix."""
    model, file = ScalableViT(**kwargs, drop_path_rate=rate).eval(), io.BytesIO()
    model.reset_classifier(classes)
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    torch.save({"model": weights, "config": model.config}, file)
    file.seek(0)
    again = load_model(file)
    assert again.config == model.config == kwargs | {"num_classes": classes, "drop_path_rate": rate}
    images = torch.randn(1, kwargs["in_chans"], 33, 40)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("classes", [0, 5, 7])
def test_changes_override_and_other_classes_get_a_fresh_head(hidden, classes, tmp_path):
    model, changes = small(head_hidden=hidden), dict(num_classes=classes, drop_path_rate=0.0, window=2)
    again = load_model(saved({"model": model.state_dict(), "config": model.config}, tmp_path), **changes)
    assert again.config == model.config | changes
    assert again(torch.zeros(1, 3, 32, 32)).shape == (1, classes or 16)
    for name, weight in again.state_dict().items():
        if classes == 5 or not name.startswith("head."):
            assert torch.equal(weight, model.state_dict()[name])
    if classes == 7:
        last = again.head if hidden is None else again.head[3]
        assert last.bias.eq(0).all()                                # as initialized


def test_a_state_dict_of_another_size_needs_changes_that_say_so(tmp_path):
    model = small()
    file = saved(model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(file)
    again = load_model(file, **model.config)
    assert torch.equal(again(torch.ones(1, 3, 30, 30)), model.eval()(torch.ones(1, 3, 30, 30)))


def test_a_backbone_without_a_head_may_get_one(tmp_path):
    file = saved(scalablevit_tiny(num_classes=0).state_dict(), tmp_path)
    assert load_model(file).num_classes == 0
    assert load_model(file, num_classes=4)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def tiny(changes={}):
    return scalablevit_tiny(num_classes=2).state_dict() | changes


def half(tmp_path):
    return saved(tiny(), tmp_path).read_bytes()[:100_000]


FIRST, BODY = "stages.0.embed.conv.weight", scalablevit_tiny(num_classes=0).state_dict()


@pytest.mark.parametrize("content, words", [
    ({}, [FIRST]), ({"model": {}}, [FIRST]), ([1, 2], []), ({"model": "tiny"}, []),
    ({"epoch": 3, "weights": {}}, [FIRST, "epoch"]), ({"conv.bias": torch.zeros(2)}, [FIRST, "conv.bias"]),
    ({"head.bias": torch.zeros(2), **BODY}, ["head.weight"]),
    (tiny({"norm.weight": torch.zeros(7)}), ["norm.weight", "[7]", "[192]"]),
    (tiny({"norm.weight": torch.full((192,), math.nan)}), ["norm.weight", "not finite"]),
    (tiny({"head.bias": torch.tensor([0, math.inf])}), ["head.bias", "not finite"]),
    (tiny({"stages.0.gamma": torch.zeros(1)}), ["stages.0.gamma"]),
    (tiny({"\x1b[31mred\nline": torch.zeros(1)}), ["x1b[31mred"]),
    *[(content, []) for content in (b"", b"<html>" * 99, half, pickle.dumps({"model": os.getcwd}))],
    (None, ["No such file"])])
def test_what_cannot_be_loaded_is_one_value_error(content, words, tmp_path):
    """On one line, with escaped names: what was expected and what was found.  Code in a file does not run."""
    file = tmp_path / "weights.pth"
    if content is half or isinstance(content, bytes):
        file.write_bytes(half(tmp_path) if content is half else content)
    elif content is not None:
        saved(content, tmp_path)
    with pytest.raises(ValueError) as caught:
        load_model(file)
    assert str(caught.value).isprintable()
    for word in [*words, "weights.pth' cannot be loaded"]:
        assert word in str(caught.value)
