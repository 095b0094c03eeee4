"""docs/ablation_mosaics.py: each row is as in the paper; the table holds what the runs say."""
import json
import pathlib
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import ablation_mosaics
from scalablevit import IWSA, SSA, SWSA, WSA


@pytest.mark.parametrize("row, kinds, rc", [
    ("WSA", [WSA, WSA], 1.25), ("SSA", [SSA, SSA], 1.25), ("SSA, r_c = 1", [SSA, SSA], 1),
    ("WSA & SWSA (Swin)", [WSA, SWSA], 1.25), ("WSA & SSA, r_c = 1 (Twins)", [WSA, SSA], 1),
    ("IWSA & SSA, no PEG", [IWSA, SSA], 1.25)])
def test_rows_are_built_in_all_four_stages(row, kinds, rc):
    model = ablation_mosaics.backbone(row)
    for stage in model.stages:
        assert [type(block.attn) for block in stage.blocks[:2]] == kinds
        assert (stage.peg is None) == ("no PEG" in row)
    assert model.config["rc"][:3] == (rc,) * 3


def test_the_table_has_means_intervals_and_what_is_missing(tmp_path, capsys):
    for seed, score in enumerate((50.0, 52.0, 54.0)):
        log = tmp_path / f"IWSASSA_{seed}" / "log.jsonl"
        log.parent.mkdir()
        log.write_text(json.dumps(dict(score=1)) + "\n" + json.dumps(dict(score=score)) + "\n")
    ablation_mosaics.main(["--table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(ablation_mosaics.ROWS)
    assert "| IWSA & SSA | 52.0 ± 5.0 | 44.9 |" in lines            # 4.303 · 2 / √3
    assert "| WSA | 0 of 3 runs | 38.9 |" in lines


@pytest.mark.slow
def test_a_row_is_trained_with_its_backbone_and_seed(tmp_path, monkeypatch):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "data" / folder / "0.png")
    monkeypatch.setattr(ablation_mosaics, "ROWS", {"LEM & SSA": ablation_mosaics.ROWS["LEM & SSA"]})
    monkeypatch.setattr(ablation_mosaics, "SEEDS", 2)
    ablation_mosaics.main(["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--size", "32",
                           "--mosaics", "8", "--batch-size", "2", "--steps", "1", "--width", "8"])
    for seed in range(2):
        state = torch.load(tmp_path / f"LEMSSA_{seed}" / "last.pt", weights_only=True)
        assert state["config"]["pattern"] == ("lem", "ssa")
        assert state["settings"]["seed"] == seed
