"""Parameter names and outputs of the published model.

`official_s.json` has the parameter names and shapes of the published ScalableViT-S, the root mean square of every
block's output (8 decimals) and the logits (9 decimals), computed in float64 by the published code.  Weights and input
are not stored: `fill` generates them from their names.
"""
import argparse
import io
import json
import math
import os
import pickle
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from helpers import architectures, ssa_by_hand
import scalablevit
from scalablevit import ScalableViT, convert_official, load_model, scalablevit_s, scalablevit_tiny

OFFICIAL = json.loads((Path(__file__).parent / "official_s.json").read_text())


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


def test_outputs_of_the_published_model(published):
    """Logits to 1e-9, every block's output to 1e-8."""
    model = scalablevit_s().double().eval()
    model.load_state_dict(convert_official(published))              # strict: every name, every shape
    rms = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            block.register_forward_hook(lambda module, args, out, name=f"stages.{i}.{j}":
                                        rms.update({name: out.square().mean().sqrt().item()}))
    with torch.no_grad():
        logits = model(fill("input", OFFICIAL["input_shape"]))
    assert (logits - torch.tensor(OFFICIAL["logits"], dtype=torch.float64)).abs().max() < 1e-9
    assert rms == pytest.approx(OFFICIAL["block_output_rms"], rel=0, abs=1e-8)


def test_every_value_is_converted_exactly_once(published):
    assert sum(tensor.numel() for tensor in convert_official(published).values()) == OFFICIAL["parameters"]
    with torch.device("meta"):
        assert set(convert_official(published)) == set(scalablevit_s().state_dict())


def test_kv_becomes_k_and_v(published):
    converted = convert_official(published)
    for parameter in ("weight", "bias"):
        kv = published[f"stages.3.1.attn.kv.{parameter}"]
        assert torch.equal(converted[f"stages.3.blocks.1.attn.k.{parameter}"], kv[:512])
        assert torch.equal(converted[f"stages.3.blocks.1.attn.v.{parameter}"], kv[512:])
        assert f"stages.3.blocks.1.attn.kv.{parameter}" not in converted


# ------------------------------------------------------------------------------------------------ S with a linear head
@pytest.fixture(scope="module")
def small_0(published):
    """The published S with a linear head: only the head's names and shapes differ; r_c = 1.25 in all four stages."""
    names = {"head.weight": (1000, 512), "head.bias": (1000,)}
    body = {name: tensor for name, tensor in published.items() if not name.startswith("head.")}
    return body | {name: weight(name, shape) for name, shape in names.items()}


def saved(content, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    return file


def test_a_linear_head_means_r_c_in_all_stages(published, small_0, tmp_path):
    two_layers = load_model(saved(published, tmp_path))
    plain = load_model(saved(small_0, tmp_path))
    assert two_layers.config == scalablevit_s().config
    assert plain.config == two_layers.config | dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25))
    assert torch.equal(plain.head.weight, small_0["head.weight"])
    assert torch.equal(plain.head.bias, small_0["head.bias"])


def test_r_c_changes_the_scale_in_the_last_stage(small_0, tmp_path):
    """Softmax(Q K^T / sqrt(1.25 C / heads)) V, with the published weights under their published names."""
    attn = load_model(saved(small_0, tmp_path)).stages[3].blocks[1].attn
    x = fill("input", (2, 7, 7, 512))
    q, kv, proj = ([small_0[f"stages.3.1.attn.{name}.{parameter}"] for parameter in ("weight", "bias")]
                   for name in ("q", "kv", "proj"))
    layers = {"q": q, "k": [tensor[:512] for tensor in kv], "v": [tensor[512:] for tensor in kv], "proj": proj}
    layers = {name: SimpleNamespace(weight=w, bias=b) for name, (w, b) in layers.items()}
    by_hand = ssa_by_hand(SimpleNamespace(**layers, heads=16), x, rc=1.25, s=1)
    torch.testing.assert_close(attn(x), by_hand, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ wrong checkpoints
@pytest.mark.parametrize("key", [
    "stages.0.0.attn.relative_position_bias_table", "patch_embeds.0.proj.gamma", "cls_token", "head.2.weight",
    "stages.0.blocks.0.norm1.weight", "module.norm.weight"])
def test_an_unknown_name_is_rejected(published, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert_official(published | {key: torch.zeros(1)})


@pytest.mark.parametrize("wrong", [None, torch.zeros(7)], ids=["missing", "misshapen"])
def test_a_missing_or_misshapen_weight_does_not_load(published, wrong, tmp_path):
    weights = dict(published)
    del weights["stages.2.7.attn.reduction.1.bias"]
    if wrong is not None:
        weights["stages.2.7.attn.reduction.1.bias"] = wrong
    with pytest.raises(ValueError, match=r"stages\.2\.blocks\.7\.attn\.reduce\.1\.bias"):
        load_model(saved(weights, tmp_path))


# ------------------------------------------------------------------------------------------------ load_model
TINY = dict(dim=8, depths=(1, 2), heads=(1, 2), rc=(1.0, 1.25), rn=(1 / 4, 1), window=3, head_hidden=None,
            num_classes=5, drop_path_rate=0.2)


def checkpoint(model, **others):
    return {"model": model.state_dict(), "config": model.config, **others}


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,
    lambda weights: {"state_dict": weights},
    lambda weights: {"model": weights, "args": argparse.Namespace(lr=1)},
    lambda weights: {f"module.{name}": w for name, w in weights.items()},
    lambda weights: {"state_dict": {f"_orig_mod.module.{name}": w for name, w in weights.items()}}])
def test_published_weights_are_found_wherever_they_stand(published, wrap, tmp_path):
    """In eval mode, in the weights' float64, with the published model's logits."""
    model = load_model(saved(wrap(published), tmp_path))
    assert not model.training
    with torch.no_grad():
        logits = model(fill("input", OFFICIAL["input_shape"])[:1])
    expected = torch.tensor(OFFICIAL["logits"][:1], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("build", ["scalablevit_tiny", "scalablevit_s", "scalablevit_b", "scalablevit_l"])
def test_a_state_dict_tells_its_size(build, tmp_path):
    """And its number of classes; the dtype becomes float32."""
    model = getattr(scalablevit, build)(num_classes=3).half()
    again = load_model(saved(model.state_dict(), tmp_path))
    assert again.config == model.config
    for name, weight in again.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].float())


@given(kwargs=architectures(), prefix=st.sampled_from(["", "module.", "module._orig_mod."]))
def test_a_checkpoint_of_any_architecture_loads(kwargs, prefix):
    """Its config says which; only the weights may have a prefix."""
    model = ScalableViT(**kwargs).eval()
    content = checkpoint(model)
    content["model"] = {prefix + name: w for name, w in content["model"].items()}
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    again = load_model(file)
    assert again.config == model.config
    images = torch.randn(1, kwargs["in_chans"], 33, 40)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("classes", [0, 5, 7])
def test_changes_override_and_other_classes_get_a_fresh_head(hidden, classes, tmp_path):
    model = ScalableViT(**{**TINY, "head_hidden": hidden})
    file = saved(checkpoint(model), tmp_path)
    again = load_model(file, num_classes=classes, drop_path_rate=0.0, window=2)
    assert again.config == model.config | dict(num_classes=classes, drop_path_rate=0.0, window=2)
    assert again(torch.zeros(1, 3, 32, 32)).shape == (1, classes or 16)
    for name, weight in again.state_dict().items():
        if classes == 5 or not name.startswith("head."):
            assert torch.equal(weight, model.state_dict()[name])
    if classes == 7:
        last = again.head if hidden is None else again.head[3]
        assert last.bias.eq(0).all()                                # as initialized


def test_a_state_dict_of_another_size_needs_changes_that_say_so(tmp_path):
    model = ScalableViT(**TINY)
    file = saved(model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(file)
    again = load_model(file, **TINY)
    assert torch.equal(again(torch.ones(1, 3, 30, 30)), model.eval()(torch.ones(1, 3, 30, 30)))


def test_a_backbone_without_a_head_may_get_one(tmp_path):
    backbone = scalablevit_tiny(num_classes=0)
    file = saved(backbone.state_dict(), tmp_path)
    assert load_model(file).num_classes == 0
    assert load_model(file, num_classes=4)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def with_name(name, value):
    return scalablevit_tiny(num_classes=2).state_dict() | {name: value}


@pytest.mark.parametrize("content, words", [
    ({}, ["stages.0.embed.conv.weight"]),
    ({"model": {}}, ["stages.0.embed.conv.weight"]),
    ([1, 2], ["cannot be loaded"]),
    ({"model": "tiny"}, ["cannot be loaded"]),
    ({"epoch": 3, "weights": {}}, ["stages.0.embed.conv.weight", "epoch"]),
    ({"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, ["stages.0.embed.conv.weight", "conv1.weight"]),
    (with_name("norm.weight", torch.zeros(7)), ["norm.weight", "[7]", "[192]"]),
    (with_name("norm.weight", torch.full((192,), math.nan)), ["norm.weight", "not finite"]),
    (with_name("head.bias", torch.tensor([0, math.inf])), ["head.bias", "not finite"]),
    (with_name("stages.0.gamma", torch.zeros(1)), ["stages.0.gamma"]),
    (with_name("\x1b[31mred\nline", torch.zeros(1)), ["x1b[31mred"])], ids=str)
def test_what_cannot_be_loaded_is_one_value_error(content, words, tmp_path):
    """On one line, with escaped names: what was expected, and what was found."""
    with pytest.raises(ValueError) as caught:
        load_model(saved(content, tmp_path))
    text = str(caught.value)
    assert text.isprintable()
    for word in [*words, "weights.pth"]:
        assert word in text


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"<html>" * 99])
def test_a_damaged_file_is_a_value_error(damage, tmp_path):
    file = saved(scalablevit_tiny().state_dict(), tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="weights.pth' cannot be loaded"):
        load_model(file)


def test_code_in_a_file_does_not_run(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"model": os.getcwd}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(file)


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        load_model(tmp_path / "weights.pth")
