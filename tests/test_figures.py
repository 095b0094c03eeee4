"""docs/figures.py, steps.py and network.py: independent checks of their numbers, and that they run."""
import itertools
import json
import pathlib
import re
import sys
import xml.etree.ElementTree

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import figures
import network
import scalablevit
import steps
from helpers import random_tokens, randomised
from scalablevit import SSA, ScalableViT, count_macs, scalablevit_tiny


# ---------------------------------------------------------------------------- figures.py
def test_every_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "scalablevit_s", scalablevit_tiny)  # saves time
    model = scalablevit_tiny(pattern=("ssa", "iwsa"), rc=(2.0, 1.0, 0.5, 1.0), num_classes=5)
    weights = tmp_path / "best.pt"
    torch.save({"model": model.state_dict(), "config": model.config}, weights)
    assert figures.load(weights)[1] == "SSA & IWSA"
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"epoch": e, "loss": 1 / e, "top1": e}) for e in (1, 2)))
    assert len(figures.maps({"SSA": weights}, size=56).axes) == 8
    assert len(figures.attention(weights, size=56).axes) == 6
    assert len(figures.field(side=14, row=7, column=3).axes) == 15
    assert len(figures.cost(sides=(32, 64, 96, 128)).axes) == 1
    assert len(figures.attention_cost(sides=(56, 112)).axes) == 1
    assert len(figures.boards(updates=2).axes) == 1
    for name, figure in {"curves.png": figures.curves(log), "ramp.svg": figures.ramp()}.items():
        figures.save(figure, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    figures.plt.close("all")


def test_the_ramp_is_one_of_means():
    """WSA: stairs; LEM dips at every border, where its zeros are; IWSA rises all the way across."""
    x, rows = figures.on_a_ramp()
    windows = x.view(3, 7)
    attended = windows.mean(1).repeat_interleave(7)
    torch.testing.assert_close(rows["wsa"], attended)
    torch.testing.assert_close(rows["lem"], (attended + F.avg_pool1d(windows, 3, 1, 1).flatten()) / 2)
    torch.testing.assert_close(rows["iwsa"], (attended + F.avg_pool1d(x[None], 3, 1, 1)[0]) / 2)
    assert (rows["iwsa"][1:20].diff() > 0).all()


@pytest.mark.parametrize("H, W", [(8, 5), (2, 7), (3, 1)])
@pytest.mark.parametrize("kind", ["wsa", "swsa", "lem", "iwsa", "ssa"])
def test_attention_maps_are_those_of_the_network(H, W, kind):
    """Multiplied by the values they are what every layer computes; a token's shares sum to 1."""
    model = randomised(ScalableViT(dim=8, depths=(2,), heads=(2,), rc=(1.25,), rn=(1 / 4,), window=3,
                                   pattern=(kind, "ssa"), num_classes=0))
    inputs = {}
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    maps = figures.attention_maps(model, random_tokens(3, 4 * H, 4 * W))
    assert [*maps] == ["stages.0.blocks.0.attn", "stages.0.blocks.1.attn"]
    for name, weights in maps.items():
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, H, W).double())
        attn = model.get_submodule(name)
        expected = inputs[attn.proj]
        if isinstance(attn, SSA):
            step = 2                                                # all tokens of a cell have its share
            values = attn.v(inputs[attn.v]).view(-(-H // 2), -1, 2, 4)          # (h, w, heads, d)
        else:
            step = 1
            qkv = attn.qkv(inputs[attn])
            values = qkv.chunk(3, dim=-1)[2].view(H, W, 2, 4)
            if kind in ("lem", "iwsa"):                             # without the convolution
                expected = attn.attend(qkv)
        z = torch.empty(H, W, 2, 4, dtype=torch.float64)
        for row, column, head in itertools.product(range(H), range(W), range(2)):
            shares = figures.seen_by(attn, weights[head, None], row, column)
            assert shares[-1, -1] == shares[::step, ::step][-1, -1]
            z[row, column, head] = (shares[::step, ::step, None] * values[:, :, head]).sum((0, 1))
        torch.testing.assert_close(z.view(expected.shape), expected)


def test_macs_by_part_agree_with_count_macs():
    """At 224 pixels: whole 7 x 7 windows, and 49 keys for SSA in every stage."""
    with torch.device("meta"):
        model = scalablevit_tiny()
    cost = count_macs(model, (224, 224))
    ssa = 0
    for i, rc in enumerate((1.25, 1.25, 1.25, 1.0)):
        C = 24 * 2 ** i
        ssa += (1, 1, 2, 1)[i] * (56 // 2 ** i) ** 2 * 49 * (int(C * rc) + C)
    parts = [1e9 * macs for macs in figures.macs_by_part(model, 224)]
    assert parts == pytest.approx([cost["modules"], cost["attention"] - ssa, ssa])


def test_networks_for_pictures_are_trained_only_once(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        figures.photograph(figures.PHOTOS[0], 56).save(tmp_path / "photos/train" / name / "0.jpg")
    arguments = dict(data=tmp_path / "photos", size=56, steps=1, folder=tmp_path)
    file = figures.trained("SSA, r_c = 1", **arguments)
    monkeypatch.delattr(figures, "classify")                        # which is not called again
    assert figures.trained("SSA, r_c = 1", **arguments) == file
    assert figures.load(file)[0].config["rc"] == (1, 1, 1, 1)


# ---------------------------------------------------------------------------- drawings
SVG = "{http://www.w3.org/2000/svg}text"
DRAWINGS = {"iwsa_steps": steps.iwsa, "ssa_steps": steps.ssa, "pyramid": network.pyramid,
            "block": network.block, "attention": network.attention}


@pytest.mark.parametrize("name", ["scalablevit_l", "scalablevit_tiny"])
def test_the_network_is_drawn_with_the_shapes_of_its_layers(name):
    """The output shapes of the layers on the meta device; in the first stage N x C is "3136 × 64"."""
    shapes = {}
    with torch.device("meta"):
        model = getattr(scalablevit, name)()
        for layer, module in model.named_modules():
            module.register_forward_hook(lambda _, args, out, layer=layer: shapes.update({layer: out.shape}))
        model(torch.empty(1, 3, 224, 224))
    _, N, scaled = shapes["stages.0.blocks.1.attn.q"]
    _, keys, C = shapes["stages.0.blocks.1.attn.v"]
    hidden = shapes["stages.0.blocks.0.mlp.fc1"][-1]
    pairs = [(N, C), (N, scaled), (keys, scaled), (keys, C), (N, keys)]
    expected = [f"{C}→{hidden}→{C}", *(f"{rows} × {columns}" for rows, columns in pairs)]
    for i, stage in enumerate(model.stages):
        _, H, W, C = shapes[f"stages.{i}"]
        expected += [f"stage {i + 1}", f"{len(stage.blocks)} blocks", f"{H} × {W} tokens",
                     f"C = {C}, {stage.blocks[0].attn.heads} heads"]
    svg = network.pyramid(name) + network.attention(name) + network.block(name)
    assert [text for text in expected if f">{text}<" not in svg] == []


@pytest.mark.parametrize("side, window, row, column", [(6, 3, 2, 2), (8, 4, 3, 5), (4, 2, 0, 0)])
def test_the_steps_of_iwsa_are_those_of_the_definition(side, window, row, column):
    """A token of value 9 window²: 9 in all of its window, and window² in the 3 x 3 tokens around it."""
    numbers = steps.iwsa_numbers(side, window, row, column, value=9 * window ** 2)
    for y in range(side):
        for x in range(side):
            own = y // window == row // window and x // window == column // window
            near = abs(y - row) <= 1 and abs(x - column) <= 1
            assert numbers["V"][y, x] == 9 * window ** 2 * ((y, x) == (row, column))
            assert numbers["Z"][y, x] == 9 * own
            assert numbers["Y"][y, x] == window ** 2 * near
            assert numbers["Z'"][y, x] == 9 * own + window ** 2 * near


def test_the_steps_of_ssa_are_those_of_the_definition():
    """A cell's key has most of the kind that the cell has most of; every query finds its own kind."""
    numbers = steps.ssa_numbers()
    torch.testing.assert_close(numbers["A"].sum(1), torch.ones(16))
    assert numbers["A"].argmax(1).tolist() == steps.MAP.flatten().tolist()
    cells = steps.MAP.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).flatten(0, 1)
    assert numbers["K'"].argmax(1).tolist() == cells.mode(1).values.tolist()


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_kept_as_they_are_drawn_and_can_be_read_from_the_last_row(name):
    """Run docs/steps.py and docs/network.py after a change.  Text has 18 pixels for a width of 1000."""
    svg = DRAWINGS[name]()
    assert svg == (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(svg)
    wide, tall = [float(n) for n in root.get("viewBox").split()[2:]]
    for text in root.iter(SVG):
        assert float(text.get("font-size")) * 1000 / wide >= 17.9
        assert 0 <= float(text.get("x")) <= wide
        assert 0 <= float(text.get("y")) <= tall


def test_every_picture_is_on_the_page():
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    pictures = {file.name for file in DOCS.iterdir() if file.suffix in (".png", ".jpg", ".svg")}
    assert pictures == set(re.findall(r"\]\((\S+\.(?:png|jpg|svg))\)", page))
    programs = re.findall(r"python (\S+\.py)", page)
    assert [program for program in programs if not (DOCS.parent / program).is_file()] == []
