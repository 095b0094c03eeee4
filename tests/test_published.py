"""The published model's check value: its own names, its own outputs.

`official_s.json` holds the parameter names and shapes of the published ScalableViT-S, the root mean square of every
block's output (8 decimals) and the logits (9 decimals), computed in float64 by the published code.  Weights and input
are not stored: a rule makes them from their names, here in `fill`.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from scalablevit import ScalableViT, convert_official, scalablevit_s

OFFICIAL = json.loads((Path(__file__).parent / "official_s.json").read_text())


def fill(name, shape):
    """Uniform in [-1, 1): splitmix64 of (crc32(name) << 32) + 0, 1, 2, ..."""
    def u64(number):
        return np.uint64(number)

    with np.errstate(over="ignore"):                                                    # arithmetic modulo 2^64 is meant
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
    model.load_state_dict(convert_official(published))                                  # strict: every name, every shape
    rms = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            block.register_forward_hook(lambda module, args, out, name=f"stages.{i}.{j}":
                                        rms.update({name: out.square().mean().sqrt().item()}))
    with torch.no_grad():
        logits = model(fill("input", OFFICIAL["input_shape"]))
    assert (logits - torch.tensor(OFFICIAL["logits"], dtype=torch.float64)).abs().max() < 1e-9
    assert rms == pytest.approx(OFFICIAL["block_output_rms"], rel=0, abs=1e-8)


def test_every_value_is_carried_over_once(published):
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


def test_both_forms_of_the_head():
    """The published names of the two heads, into a model that has the one or the other."""
    small = dict(dim=8, depths=(2,), heads=(1,), rc=(1,), rn=(1,), num_classes=3)
    body = {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    plain = {"head.weight": torch.randn(3, 8), "head.bias": torch.randn(3)}
    two_layers = {"head.0.weight": torch.randn(5, 8), "head.0.bias": torch.randn(5), "head.1.weight": torch.randn(5),
                  "head.1.bias": torch.randn(5), "head.3.weight": torch.randn(3, 5), "head.3.bias": torch.randn(3)}
    for head, hidden in ((plain, None), (two_layers, 5)):
        model = ScalableViT(**small, head_hidden=hidden)
        _, unexpected = model.load_state_dict(convert_official(body | head), strict=False)
        assert unexpected == []
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in head.items())


@pytest.mark.parametrize("key", ["stages.0.0.attn.relative_position_bias_table", "patch_embeds.0.proj.gamma", "cls_token",
                                 "head.2.weight", "stages.0.blocks.0.norm1.weight", "module.norm.weight"])
def test_an_unknown_name_is_refused_by_name(published, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert_official(published | {key: torch.zeros(1)})


def test_a_missing_or_misshapen_weight_does_not_load(published):
    with torch.device("meta"):
        model = scalablevit_s()
    name = "stages.2.7.attn.reduction.1.bias"
    missing = {key: tensor for key, tensor in published.items() if key != name}
    for wrong in (missing, missing | {name: torch.zeros(7)}):
        with pytest.raises(RuntimeError, match=r"stages\.2\.blocks\.7\.attn\.reduce\.1\.bias"):
            model.load_state_dict(convert_official(wrong), assign=True)
