"""count_macs against loops over windows and cells, a real forward pass, and the growth that the paper states."""
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
from torch.utils.flop_counter import FlopCounterMode

from helpers import architectures, plain_pieces
from scalablevit import ScalableViT, count_macs, scalablevit_s, scalablevit_tiny

FILE = Path(__file__).parents[1] / "scalablevit.py"


# ------------------------------------------------------------------------------------------------ by loops
def attention_by_loops(kind, H, W, C, window, rc, rn):
    """(convolutions and linears, Q K^T and A V) of one attention on H x W tokens, padding included."""
    modules = attention = 0
    if kind == "ssa":
        s = math.isqrt(round(1 / rn))
        scaled = C if s == 1 else int(C * rc)
        cells = 0
        for _ in range(0, H, s):
            for _ in range(0, W, s):
                cells += 1
                if s > 1:                                           # all s x s tokens, including padding
                    modules += s * s * C + C * scaled
                modules += scaled * scaled + scaled * C                                 # k, v
        for _ in range(H * W):
            modules += C * scaled + C * C                                               # q, proj
            attention += cells * (scaled + C)
        return modules, attention
    M = min(window, max(H, W))
    top, left = (-(window // 2) % window if kind == "swsa" and n > window else 0 for n in (H, W))
    for _ in plain_pieces(top + H, M):
        for _ in plain_pieces(left + W, M):
            attention += 2 * (M * M) * (M * M) * C                                      # whole windows
            if kind == "lem":
                modules += M * M * 9 * C
    if kind == "iwsa":
        modules += H * W * 9 * C
    return modules + H * W * (3 * C * C + C * C), attention


def by_loops(kwargs, H, W):
    modules = attention = 0
    before = kwargs["in_chans"]
    for i, depth in enumerate(kwargs["depths"]):
        C, side, step = kwargs["dim"] * 2 ** i, 3 if i else 7, 2 if i else 4
        H, W = math.ceil(H / step), math.ceil(W / step)
        modules += H * W * side * side * before * C + (H * W * 9 * C if kwargs["peg"] else 0)
        for j in range(depth):
            kind, rc, rn = kwargs["pattern"][j % 2], kwargs["rc"][i], kwargs["rn"][i]
            linears, products = attention_by_loops(kind, H, W, C, kwargs["window"], rc, rn)
            modules += linears + 2 * H * W * C * int(C * kwargs["mlp_ratio"])
            attention += products
        before = C
    if kwargs["num_classes"]:
        hidden = kwargs["head_hidden"]
        modules += C * kwargs["num_classes"] if hidden is None else C * hidden + hidden * kwargs["num_classes"]
    return {"modules": modules, "attention": attention}


@settings(max_examples=25)
@given(architectures(), st.integers(1, 70), st.integers(1, 70))
def test_count_macs_equals_loops_including_padding(kwargs, H, W):
    assert count_macs(ScalableViT(**kwargs), (H, W)) == by_loops(kwargs, H, W)


@pytest.mark.parametrize("size", [(224, 224), (97, 130)])
def test_count_macs_equals_a_real_forward_pass(size):
    """Counted during the forward pass, two FLOPs per multiply-accumulate; count_macs does not move the model."""
    model = scalablevit_tiny().eval()
    cost = count_macs(model, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, *size))
    assert counter.get_total_flops() == 2 * sum(cost.values())
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] == 2 * cost["attention"]
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# ------------------------------------------------------------------------------------------------ growth with N
def one_block(kind, size, window=4, rn=1 / 16):
    """Cost of one attention module on `size` (H, W) tokens: a network with one block minus everything else in it."""
    net = dict(dim=8, depths=(1,), heads=(2,), rc=(1.0,), rn=(rn,), num_classes=0, peg=False, mlp_ratio=1)
    H, W = size
    cost = count_macs(ScalableViT(**net, pattern=(kind, kind), window=window), (4 * H, 4 * W))
    return cost["modules"] - H * W * (7 * 7 * 3 * 8 + 2 * 8 * 8), cost["attention"]


@pytest.mark.parametrize("kind", ["wsa", "lem", "iwsa"])
def test_window_attention_grows_linearly_in_N(kind):
    costs = [one_block(kind, (4 * k, 8)) for k in (1, 2, 4, 8)]                         # N = 32 k
    assert costs == [(costs[0][0] * k, costs[0][1] * k) for k in (1, 2, 4, 8)]
    assert costs[0][1] == 2 * 4 ** 2 * 32 * 8                                           # 2 M² N C


def test_ssa_is_quadratic_at_a_fixed_ratio_and_linear_at_a_fixed_number_of_keys():
    ratio = [one_block("ssa", (8 * k, 8))[1] for k in (1, 2, 4)]
    assert ratio == [ratio[0], 4 * ratio[0], 16 * ratio[0]]
    assert ratio[0] == 64 * 4 * (8 + 8)                                                 # N N_rn (C + C')
    keys = [one_block("ssa", (8 * k, 8 * k), rn=1 / (2 * k) ** 2)[1] for k in (1, 2, 4)]  # 4 x 4 keys, N = 64 k²
    assert keys == [keys[0], 4 * keys[0], 16 * keys[0]]


# ------------------------------------------------------------------------------------------------ python scalablevit.py
def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["scalablevit.py", *arguments])
    runpy.run_path(str(FILE), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments, size", [((), (224, 224)), (("--size", "97", "160"), (97, 160))])
def test_the_command_prints_count_macs(arguments, size, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, *arguments)
    assert f"{size[0]}x{size[1]}" in printed
    row = next(line for line in printed.splitlines() if "scalablevit_s" in line)
    with torch.device("meta"):
        cost = count_macs(scalablevit_s(), size)
    for number in ("32,000,472", f"{cost['modules'] / 1e9:.3f}G", f"{sum(cost.values()) / 1e9:.3f}G", "32M, 4.2G"):
        assert number in row


@pytest.mark.parametrize("size", [("0", "5"), ("224", "-1"), ("a", "b"), ("224",)])
def test_the_command_rejects_a_bad_size(size, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, "--size", *size)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "--size" in printed.err


def test_the_file_works_on_its_own_and_prints_nothing(tmp_path):
    """Copied to an empty folder and imported in a new process."""
    shutil.copy(FILE, tmp_path)
    code = "import torch, scalablevit; scalablevit.scalablevit_tiny()(torch.zeros(1, 3, 32, 32))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
