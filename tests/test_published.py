"""Parameter names and outputs of the published model.

`official_s.json` has the parameter names and shapes of the published ScalableViT-S, the root mean square of every
block's output (8 decimals) and the logits (9 decimals), computed in float64 by the published code.  Weights and input
are not stored: `fill` generates them from their names.
"""
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import ssa_by_hand
from scalablevit import ScalableViT, convert_official, official_kwargs, scalablevit_s

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


def loaded(checkpoint, **kwargs):
    """A float64 model with the checkpoint's weights; every name and shape must match."""
    with torch.device("meta"):
        model = scalablevit_s(**kwargs)
    model.load_state_dict(convert_official(checkpoint), assign=True)
    return model.double().eval()


def test_a_checkpoint_only_loads_into_its_own_model(published, small_0):
    two_layers, plain = loaded(published, **official_kwargs(published)), loaded(small_0, **official_kwargs(small_0))
    assert two_layers.config == scalablevit_s().config
    assert plain.config == two_layers.config | dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25))
    assert torch.equal(plain.head.weight, small_0["head.weight"]) and torch.equal(plain.head.bias, small_0["head.bias"])
    for checkpoint, other in ((published, small_0), (small_0, published)):
        with pytest.raises(RuntimeError, match="head"):
            loaded(checkpoint, **official_kwargs(other))


def test_r_c_changes_the_scale_in_the_last_stage(small_0):
    """Softmax(Q K^T / sqrt(1.25 C / heads)) V, with the published weights under their published names."""
    attn, x = loaded(small_0, **official_kwargs(small_0)).stages[3].blocks[1].attn, fill("input", (2, 7, 7, 512))
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


def test_a_missing_or_misshapen_weight_does_not_load(published):
    with torch.device("meta"):
        model = scalablevit_s()
    name = "stages.2.7.attn.reduction.1.bias"
    missing = {key: tensor for key, tensor in published.items() if key != name}
    for wrong in (missing, missing | {name: torch.zeros(7)}):
        with pytest.raises(RuntimeError, match=r"stages\.2\.blocks\.7\.attn\.reduce\.1\.bias"):
            model.load_state_dict(convert_official(wrong), assign=True)
