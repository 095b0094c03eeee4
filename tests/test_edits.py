"""Editing scalablevit.py changes what is computed: six edits that a student may try must change the outputs.

Each replaces an expression in the file's source.  It must change the outputs in train and in eval mode; and if the
extension is installed, a model after `fuse` must compute what the edited source says.
"""
import os
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
import torch

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


def edited(name):
    """The source of scalablevit.py with the named edit applied, or unchanged if name is None."""
    text = FILE.read_text()
    if name is None:
        return text
    old, new = EDITS[name]
    if old not in text:
        pytest.fail(f"the edit {name!r} looks for {old!r}, which is no longer in scalablevit.py", pytrace=False)
    return text.replace(old, new)


def build(text):
    """Two stages with padded windows, r_n < 1 and r_n = 1.  Parameter values depend only on the parameter's name."""
    module = types.ModuleType("scalablevit")
    exec(compile(text, "scalablevit.py", "exec"), module.__dict__)
    return filled(module.ScalableViT)


def filled(network):
    model = network(dim=8, depths=(2, 2), heads=(1, 2), rc=(1.25, 1.25), rn=(1 / 4, 1), window=3, num_classes=5,
                    head_hidden=None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.copy_(torch.randn(p.shape, generator=generator) * (3 / max(p[0].numel(), 1)) ** 0.5)
    return model


def outputs(model):
    """Logits in eval and in train mode, and the gradients of all parameters."""
    images = torch.randn(2, 3, 36, 29, generator=torch.Generator().manual_seed(1))      # maps of 9 x 8 and 5 x 4
    with torch.inference_mode():
        evaluation = model.eval()(images)
    training = model.train()(images)
    gradients = torch.autograd.grad(training.square().sum(), [*model.parameters()])
    return evaluation, training.detach(), torch.cat([g.flatten() for g in gradients])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def original():
    return outputs(build(FILE.read_text()))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_outputs(name, original):
    evaluation, training, _ = outputs(build(edited(name)))
    assert distance(evaluation, original[0]) > 1e-3 and distance(training, original[1]) > 1e-3


@pytest.mark.parametrize("name", [None, *EDITS])
def test_an_edit_changes_the_outputs_after_fuse(name, original, tmp_path):
    """In a separate process, where `import scalablevit` finds the edited file."""
    pytest.importorskip("scalablevit_kernels")
    (tmp_path / "scalablevit.py").write_text(edited(name))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, __file__, tmp_path / "outputs.pt"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    plain, fused, layers = torch.load(tmp_path / "outputs.pt")
    for expected, got, before in zip(plain, fused, original):
        assert distance(got, expected) < 1e-4
        if name is None:
            assert distance(got, before) < 1e-4
    if name is None:
        assert layers == 2                                          # without an edit, both are fused
    else:
        assert all(distance(got, before) > 1e-3 for got, before in zip(fused[:2], original[:2]))


def main(file):
    """Save the outputs of the first scalablevit.py on the path, before and after fuse."""
    import scalablevit
    from scalablevit_kernels import fuse
    assert Path(scalablevit.__file__).parent == Path(file).parent
    torch.set_num_threads(1)
    model = filled(scalablevit.ScalableViT)
    plain = outputs(model)
    model = fuse(model)
    fused_layers = sum(isinstance(m, scalablevit.IWSA) and type(m) is not scalablevit.IWSA for m in model.modules())
    torch.save((plain, outputs(model), fused_layers), file)


if __name__ == "__main__":
    main(sys.argv[1])
