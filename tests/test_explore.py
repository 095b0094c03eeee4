"""docs/explore.html: its rules are those of the layers, by gradients.  Runs the page's own script with Node."""
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


def page(kinds, H, W, M):
    """What the page's `reached` says: boolean (H, W, H, W), for blocks in the order given, last one first."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    program = f"""{RULES}
    const rows = [];
    for (let token = 0; token < {H * W}; token++) {{
      const seen = reached({json.dumps(kinds)}, Math.floor(token / {W}), token % {W}, {M}, {H}, {W});
      rows.push([...seen]);
    }}
    console.log(JSON.stringify(rows));"""
    result = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    seen = torch.zeros(H * W, H * W, dtype=torch.bool)
    for token, others in enumerate(json.loads(result.stdout)):
        seen[token, others] = True
    return seen.view(H, W, H, W)


def layer(kind, M):
    return SSA(4, 2, 1.0, 1 / 4) if kind == "ssa" else ATTENTION[kind](4, 2, M)


@pytest.mark.parametrize("H, W, M", [(7, 9, 3), (8, 5, 4), (4, 6, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_that_of_the_layer(kind, H, W, M):
    assert torch.equal(page([kind], H, W, M), field(layer(kind, M), H, W))


@pytest.mark.parametrize("kinds", [("iwsa", "iwsa"), ("swsa", "wsa"), ("wsa", "swsa", "wsa"), ("lem", "ssa")])
def test_blocks_in_a_row_reach_what_a_stack_of_layers_does(kinds):
    """The network's first layer is the page's last kind."""
    H, W, M = 7, 9, 3
    blocks = [Block(layer(kind, M), 4, mlp_ratio=1, drop_path_rate=0) for kind in reversed(kinds)]
    stack = torch.nn.Sequential(*blocks)
    assert torch.equal(page([*kinds], H, W, M), field(stack, H, W))


@pytest.mark.parametrize("blocks, kinds", [(1, ["iwsa"]), (2, ["ssa", "iwsa"]), (3, ["iwsa", "ssa", "iwsa"])])
def test_kinds_alternate_from_the_last_block_to_the_first(blocks, kinds):
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    program = f'{RULES} console.log(JSON.stringify(backwards(["iwsa", "ssa"], {blocks})));'
    result = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == kinds


def test_the_page_needs_nothing_else():
    """No other file and no network; the palette is that of the pictures."""
    assert re.findall(r"""(?:src|href)=|@import|url\(|fetch\(""", PAGE) == []
    found = dict(re.findall(r'(\w+): "(#[0-9A-F]{6})"', PAGE))
    assert found == {kind: COLORS[kind] for kind in KINDS}
