"""count_macs against formulas for each layer, padding included, and `python scalablevit.py`."""
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import architectures, plain_pieces
from scalablevit import ScalableViT, count_macs, scalablevit_s

FILE = Path(__file__).parents[1] / "scalablevit.py"


def attention_by_formula(kind, H, W, C, window, rc, rn):
    """(convolutions and linears, Q K^T and A V) of one attention on H x W tokens, padding included."""
    if kind == "ssa":
        s = math.isqrt(round(1 / rn))
        scaled = C if s == 1 else int(C * rc)
        cells = len(range(0, H, s)) * len(range(0, W, s))
        reduction = s * s * C + C * scaled if s > 1 else 0          # of whole cells
        linears = cells * (reduction + scaled * scaled + scaled * C) + H * W * (C * scaled + C * C)
        return linears, H * W * cells * (scaled + C)
    M = min(window, max(H, W))
    top, left = (-(window // 2) % window if kind == "swsa" and n > window else 0 for n in (H, W))
    tokens = len(plain_pieces(top + H, M)) * len(plain_pieces(left + W, M)) * M * M     # of whole windows
    convolution = {"lem": tokens * 9 * C, "iwsa": H * W * 9 * C}.get(kind, 0)
    return convolution + H * W * (3 * C * C + C * C), 2 * tokens * M * M * C


def by_formula(kwargs, H, W):
    modules = attention = 0
    before = kwargs["in_chans"]
    for i, depth in enumerate(kwargs["depths"]):
        C, side, step = kwargs["dim"] * 2 ** i, 3 if i else 7, 2 if i else 4
        H, W = math.ceil(H / step), math.ceil(W / step)
        modules += H * W * side * side * before * C + (H * W * 9 * C if kwargs["peg"] else 0)
        for j in range(depth):
            kind, rc, rn = kwargs["pattern"][j % 2], kwargs["rc"][i], kwargs["rn"][i]
            linears, products = attention_by_formula(kind, H, W, C, kwargs["window"], rc, rn)
            modules += linears + 2 * H * W * C * int(C * kwargs["mlp_ratio"])
            attention += products
        before = C
    if kwargs["num_classes"]:
        hidden, classes = kwargs["head_hidden"], kwargs["num_classes"]
        modules += C * classes if hidden is None else C * hidden + hidden * classes
    return {"modules": modules, "attention": attention}


@settings(max_examples=25)
@given(architectures(max_stages=3), st.integers(1, 70), st.integers(1, 70))
def test_count_macs_equals_the_formulas(kwargs, H, W):
    model = ScalableViT(**kwargs)
    assert count_macs(model, (H, W)) == by_formula(kwargs, H, W)
    assert {p.device.type for p in model.parameters()} == {"cpu"}   # where it was


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scalablevit.py", *arguments])
    runpy.run_path(str(FILE), run_name="__main__")


@pytest.mark.parametrize("arguments, size", [((), (224, 224)), (("--size", "97", "160"), (97, 160))])
def test_the_command_prints_count_macs(arguments, size, monkeypatch, capsys):
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert f"{size[0]}x{size[1]}" in printed
    row, = [line for line in printed.splitlines() if "scalablevit_s" in line]
    with torch.device("meta"):
        cost = count_macs(scalablevit_s(), size)
    for number in (cost["modules"], sum(cost.values())):
        assert f"{number / 1e9:.3f}G" in row
    assert "32,000,472" in row
    assert "32M, 4.2G" in row


@pytest.mark.parametrize("size", [("0", "5"), ("224", "-1"), ("a", "b"), ("224",)])
def test_the_command_rejects_a_bad_size(size, monkeypatch, capsys):
    with pytest.raises(SystemExit, check=lambda end: end.code == 2):
        run(monkeypatch, "--size", *size)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--size" in printed.err


def test_the_file_works_on_its_own(tmp_path):
    """In a new process and an empty folder it prints nothing, and imports no torchvision or kernels."""
    shutil.copy(FILE, tmp_path)
    code = ("import sys, torch, scalablevit; scalablevit.scalablevit_tiny()(torch.zeros(1, 3, 32, 32)); "
            "sys.exit(bool({'torchvision', 'scalablevit_kernels'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0
    assert "scalablevit_kernels" not in FILE.read_text()
