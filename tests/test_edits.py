"""Six edits of scalablevit.py that a student may try, each of an expression in its source.

Each must change the outputs in train and in eval mode; and if the extension is installed, a model after
`fuse` must compute what the edited source says.
"""
import runpy
import sys
import types
import zlib
from pathlib import Path

import pytest
import torch

from helpers import random_tokens, small

FILE = Path(__file__).parents[1] / "scalablevit.py"
EDITS = {  # name: (expression in the file, its replacement)
    "LayerNorm on q and k": ("(q * scale) @ k",
                             "(F.layer_norm(q, q.shape[-1:]) * scale) @ F.layer_norm(k, k.shape[-1:])"),
    "dilated LIM": ("self.lim = depthwise(dim)",
                    "self.lim = nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim)"),
    "SiLU for GELU": ("nn.GELU()", "nn.SiLU()"),
    "another scale": ("q.shape[-1] ** -0.5", "q.shape[-1] ** -1.0"),
    "padding is seen": ("transpose(-2, -1) > 0", "transpose(-2, -1) >= 0"),
    "r_n = 1 reduces too": ("self.s > 1", "self.s > 0"),
}


def build(edit=None):
    """The edited file, and a model of it.  Parameter values depend only on the parameter's name."""
    text, (old, new) = FILE.read_text(), EDITS.get(edit, ("", ""))
    if old not in text:
        pytest.fail(f"the edit {edit!r} looks for {old!r}, no longer in scalablevit.py", pytrace=False)
    file = types.ModuleType("scalablevit")
    exec(compile(text.replace(old, new), "scalablevit.py", "exec"), file.__dict__)
    model = file.ScalableViT(**small(rc=(1.25, 1.25)).config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.copy_(torch.randn(p.shape, generator=generator) * (3 / max(p[0].numel(), 1)) ** 0.5)
    return file, model


def outputs(model):
    """Logits in eval and in train mode, and the gradients of all parameters."""
    images = random_tokens(2, 3, 36, 29).float()                    # maps of 9 x 8 and 5 x 4
    with torch.inference_mode():
        evaluation = model.eval()(images)
    training = model.train()(images)
    gradients = torch.autograd.grad(training.square().sum(), [*model.parameters()])
    return evaluation, training.detach(), torch.cat([g.flatten() for g in gradients])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", [None, *EDITS])
def test_an_edit_changes_the_outputs_also_after_fuse(name, monkeypatch):
    file, model = build(name)
    plain, original = outputs(model), outputs(build()[1])
    for got, before in zip(plain[:2], original):
        assert (distance(got, before) > 1e-3) == (name is not None)
    kernels = pytest.importorskip("scalablevit_kernels")
    monkeypatch.setitem(sys.modules, "scalablevit", file)
    path = Path(kernels.__file__).with_name("fuse.py")              # again, to import the edited file
    runpy.run_path(str(path), run_name="scalablevit_kernels.edited")["fuse"](model)
    fused = [type(layer).__name__ for layer in model.modules() if "Fused" in type(layer).__name__]
    assert name is not None or fused == ["FusedIWSA", "FusedSSA"] * 2
    for got, expected in zip(outputs(model), plain):
        assert distance(got, expected) < 1e-4
