"""docs/figures.py: its numbers by other means, and that it runs.  Matplotlib is an extra."""
import argparse
import json
import pathlib
import sys

import pytest
import torch
from hypothesis import given, strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

from scalablevit import SWSA, ScalableViT, count_macs, scalablevit_tiny
from test_published import OFFICIAL


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    import figures
    return figures


# ------------------------------------------------------------------------------------------------ figures.py
@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 8), st.floats(0.5, 20))
def test_the_border_step_is_what_was_put_there(H, W, M, jump):
    """Steps of 1 along both axes, and of `jump` at a border: windows differ that much more than neighbours within."""
    pytest.importorskip("matplotlib")
    import figures
    height = [torch.tensor([1.0 if i % M else jump for i in range(n)]).cumsum(0) for n in (H, W)]
    tokens = torch.stack(torch.meshgrid(*height, indexing="ij"), dim=-1)
    ratio = figures.border_step(tokens, M)
    assert ratio != ratio if max(H, W) <= M else ratio == pytest.approx(jump, rel=1e-4)


def test_every_picture_is_drawn(figures, tmp_path):
    """From weights as they are saved by hand and by the training program, for each pattern that weights can tell."""
    weights = []
    for i, pattern in enumerate([("wsa", "wsa"), ("lem", "ssa"), ("ssa", "iwsa")]):
        weights.append(tmp_path / f"{i}.pt")
        state = scalablevit_tiny(pattern=pattern, rc=(2.0, 1.0, 0.5, 1.0), num_classes=5, peg=i > 0).state_dict()
        torch.save({"model": state, "settings": {}} if i else state, weights[-1])
    assert [figures.load(file)[1] for file in weights] == ["WSA", "LEM & SSA", "SSA & IWSA"]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"epoch": e, "loss": 1 / e, "top1": e, "lr": e}) + "\n" for e in (1, 2)))
    figures.maps(tmp_path, weights=weights)
    figures.network(tmp_path)
    figures.field(tmp_path, side=21)
    figures.cost(tmp_path, sides=(32, 64))
    figures.curves(tmp_path, log)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"network", "maps", "field", "cost", "curves"}


def test_a_checkpoint_tells_what_its_parameters_do_not(figures, tmp_path):
    """Ours by its "config", a published one by the form of its head; training arguments beside it do no harm."""
    ours = scalablevit_tiny(pattern=("swsa", "ssa"), window=5)
    torch.save({"model": ours.state_dict(), "config": ours.config}, tmp_path / "ours.pt")
    model, name = figures.load(tmp_path / "ours.pt")
    assert name == "SWSA & SSA" and isinstance(model.stages[0].blocks[0].attn, SWSA) and model.config["window"] == 5
    shapes = {name: shape for name, shape in OFFICIAL["state_dict"].items() if not name.startswith("head.")}
    for head, rc in (({"head.0.weight": [4096, 512]}, 1.0), ({"head.weight": [1000, 512]}, 1.25)):
        weights = {name: torch.zeros(()).expand(shape) for name, shape in (shapes | head).items()}
        torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "theirs.pt")
        assert tuple(figures.load(tmp_path / "theirs.pt")[0].config["rc"]) == (1.25, 1.25, 1.25, rc)


def test_the_parts_of_the_cost_are_those_of_count_macs(figures):
    """On 56 x 56 tokens (the first map) and fewer: whole windows of 7, and SSA's 49 keys in every stage."""
    with torch.device("meta"):
        model = scalablevit_tiny()
    cost, tokens = count_macs(model, (224, 224)), [56 ** 2, 28 ** 2, 14 ** 2, 7 ** 2]
    ssa = sum(n * 49 * (int(24 * 2 ** i * rc) + 24 * 2 ** i) * (2 if i == 2 else 1)
              for i, (n, rc) in enumerate(zip(tokens, (1.25, 1.25, 1.25, 1.0))))
    assert figures.macs_by_part(model, 224) == [
        count / 1e9 for count in (cost["modules"], cost["attention"] - ssa, ssa)]


def test_without_weights_networks_are_trained_once(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    updates, train = [], figures.segmentation.train
    monkeypatch.setattr(figures.segmentation, "train", lambda model, steps: updates.append(steps) or train(model, 1))
    figures.maps(tmp_path)
    figures.maps(tmp_path)
    assert len(updates) == 3 and len(list(tmp_path.rglob("*.pt"))) == 3 and (tmp_path / "maps.png").exists()
