"""docs/figures.py and docs/network.py: independent checks of their numbers, and that they run (needs matplotlib)."""
import argparse
import json
import pathlib
import re
import sys
import xml.etree.ElementTree

import pytest
import torch
from hypothesis import given, strategies as st

DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import helpers
import network
import scalablevit
import steps
from scalablevit import SWSA, ScalableViT, count_macs, scalablevit_tiny
from test_published import OFFICIAL


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
    """From plain state dicts and checkpoints, for each pattern that can be inferred from parameters."""
    weights = []
    for i, pattern in enumerate([("wsa", "wsa"), ("lem", "ssa"), ("ssa", "iwsa")]):
        weights.append(tmp_path / f"{i}.pt")
        state = scalablevit_tiny(pattern=pattern, rc=(2.0, 1.0, 0.5, 1.0), num_classes=5, peg=i > 0).state_dict()
        torch.save({"model": state, "settings": {}} if i else state, weights[-1])
    assert [figures.load(file)[1] for file in weights] == ["WSA", "LEM & SSA", "SSA & IWSA"]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"epoch": e, "loss": 1 / e, "top1": e, "lr": e}) + "\n" for e in (1, 2)))
    pictures = {"maps": figures.maps(weights=weights[:1]), "field": figures.field(side=21),
                "cost": figures.cost(sides=(32, 64, 96, 128)), "curves": figures.curves(log)}
    for name, figure in pictures.items():
        figures.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()


@given(st.integers(0, 20), st.integers(0, 20), st.integers(8, 21), st.integers(8, 21))
def test_influence_is_that_of_the_text(row, column, H, W):
    """A token moves all of its window; with LIM also its eight neighbors.  Nothing else moves at all."""
    pytest.importorskip("matplotlib")
    import figures
    row, column = min(row, H - 1), min(column, W - 1)
    near = {(y, x) for y in range(row - 1, row + 2) for x in range(column - 1, column + 2) if 0 <= y < H and 0 <= x < W}
    window = {(y, x) for y in range(H) for x in range(W) if (y // 7, x // 7) == (row // 7, column // 7)}
    x = torch.randn(1, H, W, 4, dtype=torch.float64)
    for name, module in figures.window_attentions(4, 2).items():
        moved = {(y, x) for y, x in figures.influence(module.double(), x, row, column).nonzero().tolist()}
        assert moved == (window | near if name == "IWSA" else window)


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


@given(st.integers(0, 1000))
def test_naming_the_most_common_hue(seed):
    """Against a count, board by board."""
    pytest.importorskip("matplotlib")
    import ablation
    import figures
    boards, hues = ablation.draw_global(5, torch.Generator().manual_seed(seed))
    right = asked = 0
    for board, labels in zip(boards, hues):
        items = [int(cell.argmax()) for cell in board[16:20].flatten(1).T if cell.any()]
        common = max(range(4), key=items.count)                     # the first, if two are as common
        questions = labels[labels >= 0].tolist()
        right, asked = right + questions.count(common), asked + len(questions)
    assert figures.right_with_common_hue(boards, hues) == pytest.approx(100 * right / asked)


@given(st.integers(0, 1000), st.sampled_from([1 / 4, 1 / 16]))
def test_the_answer_to_a_question_is_found_and_its_share_of_the_attention(seed, rn):
    """Against a loop over cells: codes are compared bit by bit, and the labels of the board are the answers' hues."""
    pytest.importorskip("matplotlib")
    import ablation
    import figures
    boards, hues = ablation.draw_global(2, torch.Generator().manual_seed(seed))
    twins = figures.answers(boards, bits=15)
    net, _ = figures.learn_boards(rn, 2.0, updates=1)
    net, found, s = helpers.randomised(net), figures.answers(boards), round(rn ** -0.5)
    A = figures.attention_matrix(net, boards.double())
    torch.testing.assert_close(A.sum(-1), torch.ones(2, 64).double())
    shares = []
    for b in range(2):
        for n in range(64):
            asked = boards[b, 20:, n // 8, n % 8]
            items = [m for m in range(64) if asked.any() and torch.equal(boards[b, :16, m // 8, m % 8], asked)]
            assert found[b, n].nonzero().flatten().tolist() == items and bool(items) == (hues[b, 0, n // 8, n % 8] >= 0)
            close = [m for m in range(64) if asked.any() and (boards[b, :16, m // 8, m % 8] == asked).sum() == 15]
            assert twins[b, n].nonzero().flatten().tolist() == close
            if items:
                assert int(hues[b, 0, n // 8, n % 8]) in {int(boards[b, 16:20, m // 8, m % 8].argmax()) for m in items}
                keys = {m // 8 // s * (8 // s) + m % 8 // s for m in items}
                shares.append(sum(A[b, n, key].item() for key in keys))
    assert figures.share_on_the_answer(net, boards.double()) == pytest.approx(sum(shares) / len(shares))


def test_attention_maps_are_those_of_the_network(figures):
    """Multiplied by V' they are what SSA passes to its projection."""
    net = helpers.randomised(scalablevit.ScalableViT(**figures.ablation.NET | {"in_chans": 3, "heads": (1,)}))
    images = torch.randn(1, 3, 32, 32).double()
    seen, attn = [], net.stages[0].blocks[1].attn
    attn.proj.register_forward_hook(lambda layer, x, y: seen.append(x[0].flatten(1, 2)))
    z = figures.attention_matrix(net, images) @ figures.ssa_matrices(net, images, 0)[2]
    torch.testing.assert_close(z, seen[0].detach())


def test_networks_learn_from_boards_and_are_drawn(figures):
    net, right = figures.learn_boards(1 / 4, 1.0, updates=2)
    assert right.shape == (2,) and (right >= 0).all() and (right <= 100).all()
    assert len(figures.looks({"a": net, "b": net}).axes) == 9


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
    _, H, W, scaled = shapes["stages.0.blocks.1.attn.q"]
    _, h, w, C = shapes["stages.0.blocks.1.attn.v"]
    drawn = texts(network.attention(name))
    for shape in ((H * W, C), (H * W, scaled), (h * w, scaled), (h * w, C), (H * W, h * w)):
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


def test_load_reads_what_the_parameters_do_not_tell(figures, tmp_path):
    """From "config", or for published models from the kind of head; extra training arguments are ignored."""
    ours = scalablevit_tiny(pattern=("swsa", "ssa"), window=5)
    torch.save({"model": ours.state_dict(), "config": ours.config}, tmp_path / "ours.pt")
    model, name = figures.load(tmp_path / "ours.pt")
    assert name == "SWSA & SSA" and isinstance(model.stages[0].blocks[0].attn, SWSA) and model.config["window"] == 5
    shapes = {name: shape for name, shape in OFFICIAL["state_dict"].items() if not name.startswith("head.")}
    for head, rc in (({"head.0.weight": [4096, 512]}, 1.0), ({"head.weight": [1000, 512]}, 1.25)):
        weights = {name: torch.zeros(()).expand(shape) for name, shape in (shapes | head).items()}
        torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "theirs.pt")
        assert tuple(figures.load(tmp_path / "theirs.pt")[0].config["rc"]) == (1.25, 1.25, 1.25, rc)


def test_macs_by_part_agree_with_count_macs(figures):
    """At 224 pixels: whole 7 x 7 windows, and 49 keys for SSA in every stage."""
    with torch.device("meta"):
        model = scalablevit_tiny()
    cost, tokens = count_macs(model, (224, 224)), [56 ** 2, 28 ** 2, 14 ** 2, 7 ** 2]
    ssa = sum(n * 49 * (int(24 * 2 ** i * rc) + 24 * 2 ** i) * (2 if i == 2 else 1)
              for i, (n, rc) in enumerate(zip(tokens, (1.25, 1.25, 1.25, 1.0))))
    assert figures.macs_by_part(model, 224) == [
        count / 1e9 for count in (cost["modules"], cost["attention"] - ssa, ssa)]


def test_without_weights_the_networks_are_trained_only_once(figures, tmp_path, monkeypatch):
    """On synthetic shapes or a folder of images: three networks each, with one update instead of 1200."""
    monkeypatch.chdir(tmp_path)
    trained, train = [], figures.dense.train

    def once(model, loss, batches, steps, *args):
        trained.append(model)
        return train(model, loss, batches, 1, *args)

    monkeypatch.setattr(figures.dense, "train", once)
    cat = figures.Image.open(DOCS / "cat.jpg").resize((112, 112))
    for name in ("one", "two"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        cat.save(tmp_path / "photos/train" / name / "cat.jpg")
    for data in (None, None, tmp_path / "photos", tmp_path / "photos"):
        figures.maps(tmp_path / "photos/train/one/cat.jpg", data=data)
    assert len(trained) == 6 and len(list(tmp_path.rglob("*.pt"))) == 6


# ------------------------------------------------------------------------------------------------ docs/README.md
def test_every_picture_is_on_the_page():
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    pictures = {file.name for pattern in ("*.png", "*.jpg", "*.svg") for file in DOCS.glob(pattern)}
    assert pictures == set(re.findall(r"\]\((\S+\.(?:png|jpg|svg))\)", page))
    for program in re.findall(r"python (\S+\.py)", page):
        assert (DOCS.parent / program).is_file()
