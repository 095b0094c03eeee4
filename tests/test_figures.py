"""docs/figures.py and docs/network.py: independent checks of their numbers, and that they run (needs matplotlib)."""
import json
import pathlib
import re
import sys
import xml.etree.ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import helpers
import network
import scalablevit
import steps
from scalablevit import ScalableViT, count_macs, scalablevit_tiny


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    import figures
    return figures


# ------------------------------------------------------------------------------------------------ figures.py
@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 8), st.floats(0.5, 20))
def test_the_border_step_is_recovered(H, W, M, jump):
    """Tokens with steps of 1 along both axes, and of `jump` at window borders."""
    pytest.importorskip("matplotlib")
    import figures
    height = [torch.tensor([1.0 if i % M else jump for i in range(n)]).cumsum(0) for n in (H, W)]
    tokens = torch.stack(torch.meshgrid(*height, indexing="ij"), dim=-1)
    ratio = figures.border_step(tokens, M)
    assert ratio != ratio if max(H, W) <= M else ratio == pytest.approx(jump, rel=1e-4)


def test_every_picture_is_drawn(figures, tmp_path):
    weights = []
    for pattern in (("wsa", "wsa"), ("lem", "ssa"), ("ssa", "iwsa")):
        model = scalablevit_tiny(pattern=pattern, rc=(2.0, 1.0, 0.5, 1.0), num_classes=5)
        weights.append(tmp_path / f"{len(weights)}.pt")
        torch.save({"model": model.state_dict(), "config": model.config}, weights[-1])
    names = [figures.load(file)[1] for file in weights]
    assert names == ["WSA", "LEM & SSA", "SSA & IWSA"]
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"epoch": e, "loss": 1 / e, "top1": e, "lr": e}) for e in (1, 2)]
    log.write_text("\n".join(lines))
    assert len(figures.maps({"WSA": weights[0]}, size=56).axes) == 8
    assert len(figures.attention(weights[2], size=56).axes) == 6
    assert len(figures.field(side=14, row=7, column=3).axes) == 15
    assert len(figures.cost(sides=(32, 64, 96, 128)).axes) == 1
    assert len(figures.attention_cost(sides=(56, 112)).axes) == 1
    assert len(figures.boards(updates=2).axes) == 1
    pictures = {"curves.png": figures.curves(log), "ramp.svg": figures.ramp()}
    for name, figure in pictures.items():
        figures.save(figure, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    figures.plt.close("all")


@given(st.integers(7, 22), st.integers(7, 22), st.integers(1, 3))
def test_windows_set_to_means_are_means(H, W, dim):
    """Against means taken one token at a time."""
    pytest.importorskip("matplotlib")
    import figures
    x = torch.randn(1, H, W, dim, dtype=torch.float64)
    modules = figures.window_attentions(dim, 1)
    for module in modules.values():
        figures.set_to_means(module)
    wsa, lem, iwsa = (module.double()(x)[0].detach() for module in modules.values())
    for r in range(H):
        for c in range(W):
            top, left = r // 7 * 7, c // 7 * 7
            window = x[0, top:top + 7, left:left + 7].mean(dim=(0, 1))
            torch.testing.assert_close(wsa[r, c], window)
            all_near = x[0, max(r - 1, 0):r + 2, max(c - 1, 0):c + 2].sum(dim=(0, 1)) / 9
            torch.testing.assert_close(iwsa[r, c], window + all_near)
            own_near = x[0, max(r - 1, top):min(r + 2, top + 7), max(c - 1, left):min(c + 2, left + 7)]
            torch.testing.assert_close(lem[r, c], window + own_near.sum(dim=(0, 1)) / 9)


def test_the_ramp_is_what_the_page_says(figures):
    """WSA has three steps; LEM dips at borders; IWSA and LEM agree elsewhere; both rise inside."""
    x, rows = figures.on_a_ramp()
    assert len(rows["wsa"].mul(1000).round().unique()) == 3
    differ = (rows["iwsa"] - rows["lem"]).abs() > 1e-6
    assert differ.nonzero().flatten().tolist() == [6, 7, 13, 14]
    assert (rows["lem"] <= rows["iwsa"] + 1e-6).all()
    assert (rows["iwsa"][1:20].diff() > 0).all()
    torch.testing.assert_close(rows["iwsa"][10], x[10])


# ------------------------------------------------------------------------------------------------ attention maps
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(["wsa", "swsa", "lem", "iwsa", "ssa"]))
def test_attention_maps_are_those_of_the_network(H, W, kind):
    """Multiplied by the values they are what every layer computes; a token's shares sum to 1."""
    pytest.importorskip("matplotlib")
    import figures
    model = helpers.randomised(ScalableViT(dim=8, depths=(2,), heads=(2,), rc=(1.25,), rn=(1 / 4,), window=3,
                                           pattern=(kind, "ssa"), num_classes=0))
    image = torch.randn(3, 4 * H, 4 * W, dtype=torch.float64)
    inputs = {}
    for name in ("stages.0.blocks.0.attn", "stages.0.blocks.1.attn"):
        attn = model.get_submodule(name)
        attn.register_forward_hook(lambda attn, args, out: inputs.update({attn: args[0]}))
        attn.proj.register_forward_hook(lambda proj, args, out, attn=attn: inputs.update({(attn, "z"): args[0]}))
    maps = figures.attention_maps(model, image)
    assert [*maps] == ["stages.0.blocks.0.attn", "stages.0.blocks.1.attn"]
    for name, weights in maps.items():
        attn = model.get_submodule(name)
        x = inputs[attn]
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, H, W).double())
        if isinstance(attn, scalablevit.SSA):
            shares = figures.seen_by(attn, weights, H - 1, 0)
            assert shares[-1, -1] == weights[:, H - 1, 0].mean(0)[-1, -1]
            reduced = F.pad(x, (0, 0, 0, -W % 2, 0, -H % 2))
            reduced = F.gelu(attn.norm(scalablevit.convolve(attn.reduce, reduced)))
            v = attn.v(reduced)[0].unflatten(-1, (2, -1))           # (h, w, heads, d)
            z = torch.einsum("nijhw,hwnd->ijnd", weights, v).flatten(2)
            torch.testing.assert_close(z, inputs[attn, "z"][0])
        else:
            v = attn.qkv(x)[0].chunk(3, dim=-1)[2].unflatten(-1, (2, -1))       # (H, W, heads, d)
            z = torch.empty(H, W, 2, v.shape[-1], dtype=torch.float64)
            for row in range(H):
                for column in range(W):
                    for head in range(2):
                        shares = figures.seen_by(attn, weights[head:head + 1], row, column)
                        z[row, column, head] = (shares[..., None] * v[:, :, head]).sum((0, 1))
            expected = inputs[attn, "z"][0] if kind == "swsa" else attn.attend(attn.qkv(x))[0]
            torch.testing.assert_close(z.flatten(2), expected)


def test_networks_learn_from_boards(figures):
    right = figures.learn_boards(updates=2)
    assert right.shape == (2,)
    assert (right >= 0).all()
    assert (right <= 100).all()


# ------------------------------------------------------------------------------------------------ drawings
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    """All strings of a drawing, subscripts included."""
    root = xml.etree.ElementTree.fromstring(svg)
    return {"".join(text.itertext()).replace("\u200b", "") for text in root.iter(SVG + "text")}


@pytest.mark.parametrize("name", ["scalablevit_s", "scalablevit_l", "scalablevit_tiny"])
def test_the_network_is_drawn_with_the_shapes_of_its_layers(name):
    """The output shapes of the layers on the meta device; in the first stage N x C is "3136 × 64"."""
    shapes = {}
    with torch.device("meta"):
        model = getattr(scalablevit, name)()
        for layer, module in model.named_modules():
            module.register_forward_hook(lambda _, args, out, layer=layer: shapes.update({layer: out.shape}))
        model(torch.empty(1, 3, 224, 224))
    drawn = texts(network.pyramid(name))
    for i, stage in enumerate(model.stages):
        _, H, W, C = shapes[f"stages.{i}"]
        assert f"stage {i + 1}" in drawn
        assert f"{len(stage.blocks)} blocks" in drawn
        assert f"{H} × {W} tokens" in drawn
        assert f"C = {C}, {stage.blocks[0].attn.heads} heads" in drawn
    _, N, scaled = shapes["stages.0.blocks.1.attn.q"]
    _, keys, C = shapes["stages.0.blocks.1.attn.v"]
    drawn = texts(network.attention(name))
    for shape in ((N, C), (N, scaled), (keys, scaled), (keys, C), (N, keys)):
        assert f"{shape[0]} × {shape[1]}" in drawn
    hidden = shapes["stages.0.blocks.0.mlp.fc1"][-1]
    assert f"{C}→{hidden}→{C}" in texts(network.block(name))


@pytest.mark.parametrize("side, window, row, column", [(6, 3, 2, 2), (8, 4, 3, 5), (4, 2, 0, 0)])
def test_the_steps_of_iwsa_are_those_of_the_definition(side, window, row, column):
    """A token of value window²: 1 in all of its window, and window² / 9 in the 3 x 3 tokens around it."""
    numbers = steps.iwsa_numbers(side, window, row, column, value=9 * window ** 2)
    for y in range(side):
        for x in range(side):
            own = y // window == row // window and x // window == column // window
            near = abs(y - row) <= 1 and abs(x - column) <= 1
            assert numbers["V"][y, x] == 9 * window ** 2 * (y == row and x == column)
            assert numbers["Z"][y, x] == 9 * own
            assert numbers["Y"][y, x] == window ** 2 * near
            assert numbers["Z'"][y, x] == 9 * own + window ** 2 * near


def test_the_steps_of_ssa_are_those_of_the_definition():
    """A cell's key has most of the kind that the cell has most of; every query finds its own kind."""
    numbers = steps.ssa_numbers()
    A, keys = numbers["A"], numbers["K'"]
    assert A.shape == (16, 4)
    torch.testing.assert_close(A.sum(1), torch.ones(16))
    for cell in range(4):
        r, c = 2 * (cell // 2), 2 * (cell % 2)
        kinds = steps.MAP[r:r + 2, c:c + 2].flatten().tolist()
        assert keys[cell].argmax() == max(range(4), key=kinds.count)
    assert A.argmax(1).tolist() == steps.MAP.flatten().tolist()


def test_drawings_are_kept_as_they_are_drawn():
    """Run docs/steps.py and docs/network.py after a change."""
    drawn = {"iwsa_steps": steps.iwsa, "ssa_steps": steps.ssa, "pyramid": network.pyramid,
             "block": network.block, "attention": network.attention}
    for name, draw in drawn.items():
        assert (DOCS / f"{name}.svg").read_text(encoding="utf-8") == draw(), name


@pytest.mark.parametrize("file", ["iwsa_steps", "ssa_steps", "pyramid", "block", "attention"])
def test_drawings_can_be_read_from_the_last_row(file):
    """Text has 18 pixels for a picture 1000 wide, and 70 % of that in subscripts; it lies inside."""
    root = xml.etree.ElementTree.parse(DOCS / f"{file}.svg").getroot()
    wide, tall = [float(n) for n in root.get("viewBox").split()[2:]]
    for text in root.iter(SVG + "text"):
        assert float(text.get("font-size")) * 1000 / wide >= 17.9
        assert 0 <= float(text.get("x")) <= wide
        assert 0 <= float(text.get("y")) <= tall


def test_macs_by_part_agree_with_count_macs(figures):
    """At 224 pixels: whole 7 x 7 windows, and 49 keys for SSA in every stage."""
    with torch.device("meta"):
        model = scalablevit_tiny()
    cost, tokens = count_macs(model, (224, 224)), [56 ** 2, 28 ** 2, 14 ** 2, 7 ** 2]
    ssa = sum(n * 49 * (int(24 * 2 ** i * rc) + 24 * 2 ** i) * (2 if i == 2 else 1)
              for i, (n, rc) in enumerate(zip(tokens, (1.25, 1.25, 1.25, 1.0))))
    assert figures.macs_by_part(model, 224) == [
        count / 1e9 for count in (cost["modules"], cost["attention"] - ssa, ssa)]


def test_networks_for_pictures_are_trained_only_once(figures, tmp_path, monkeypatch):
    """On a folder of images, with one update instead of 600; the stored network is what load reads."""
    for name in ("one", "two"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        for i, photo in enumerate(figures.PHOTOS):
            figures.photograph(photo, 56).save(tmp_path / f"photos/train/{name}/{i}.jpg")
    trained = []
    classify = figures.classify

    def once(model, images, steps):
        trained.append(model)
        classify(model, images, 1)

    monkeypatch.setattr(figures, "classify", once)
    for _ in range(2):
        for row in ("WSA", "SSA, r_c = 1"):
            file = figures.trained(row, tmp_path / "photos", size=56, folder=tmp_path)
    assert len(trained) == 2
    model, name = figures.load(file)
    assert name == "SSA"
    assert [*model.config["rc"]] == [1, 1, 1, 1]
    weights = trained[1].state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


# ------------------------------------------------------------------------------------------------ docs/README.md
def test_every_picture_is_on_the_page():
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    pictures = {file.name for pattern in ("*.png", "*.jpg", "*.svg") for file in DOCS.glob(pattern)}
    shown = set(re.findall(r"\]\((\S+\.(?:png|jpg|svg))\)", page))
    assert pictures == shown
    for program in re.findall(r"python (\S+\.py)", page):
        assert (DOCS.parent / program).is_file()
