"""docs/explore.html: its rules are those of the layers, by gradients.  Runs the page's script with Node."""
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from drawing import COLORS
from scalablevit import ATTENTION, SSA, Block
from test_receptive_field import field

KINDS = ["wsa", "lem", "iwsa", "swsa", "ssa"]
PAGE = (DOCS / "explore.html").read_text(encoding="utf-8")
RULES = re.search(r'<script id="rules">(.*?)</script>', PAGE, re.DOTALL)[1]


def script(expression):
    """The value of an expression in the page's script."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    command = ["node", "-e", f"{RULES} console.log(JSON.stringify({expression}));"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def layer(kind, M):
    return SSA(4, 2, 1.0, 1 / 4) if kind == "ssa" else ATTENTION[kind](4, 2, M)


def equal_fields(kinds, H, W, M):
    """Whether the page's `reached` says what the layers do; the page names the last layer first."""
    tokens = [[row, column] for row in range(H) for column in range(W)]
    answers = script(f"{tokens}.map(([r, c]) => [...reached({json.dumps(kinds)}, r, c, {M}, {H}, {W})])")
    seen = torch.zeros(H * W, H * W, dtype=torch.bool)
    for token, others in enumerate(answers):
        seen[token, others] = True
    blocks = [Block(layer(kind, M), 4, mlp_ratio=1, drop_path_rate=0) for kind in reversed(kinds)]
    net = torch.nn.Sequential(*blocks) if len(blocks) > 1 else blocks[0].attn
    return torch.equal(seen.view(H, W, H, W), field(net, H, W))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_that_of_the_layer(kind):
    for H, W, M in (7, 9, 3), (8, 5, 4), (4, 6, 5):
        assert equal_fields([kind], H, W, M), (H, W, M)


@pytest.mark.parametrize("kinds", [["iwsa", "iwsa"], ["swsa", "wsa"], ["wsa", "swsa", "wsa"], ["lem", "ssa"]])
def test_blocks_in_a_row_reach_what_a_stack_of_layers_does(kinds):
    assert equal_fields(kinds, 7, 9, 3)


def test_kinds_alternate_from_the_last_block_to_the_first():
    assert script('[1, 2, 3].map(n => backwards(["iwsa", "ssa"], n))') == [
        ["iwsa"], ["ssa", "iwsa"], ["iwsa", "ssa", "iwsa"]]


def test_the_page_needs_nothing_else():
    """No other file and no network; the palette is that of the pictures."""
    assert re.findall(r"""(?:src|href)=|@import|url\(|fetch\(""", PAGE) == []
    assert dict(re.findall(r'(\w+): "(#[0-9A-F]{6})"', PAGE)) == {kind: COLORS[kind] for kind in KINDS}
