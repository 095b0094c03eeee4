"""docs/ablation_mosaics.py: each row is trained as the paper's row is built, and the table holds what the runs say."""
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchvision")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import ablation_mosaics
from scalablevit import IWSA, SSA, SWSA, WSA


def kinds(row):
    model = ablation_mosaics.backbone(row)
    return [[type(block.attn) for block in stage.blocks[:2]] for stage in model.stages], model


def test_rows_are_built_in_all_four_stages():
    assert kinds("IWSA & SSA")[0] == [[IWSA, SSA]] * 4
    assert kinds("WSA")[0] == [[WSA, WSA]] * 4
    assert kinds("SSA, r_c = 1")[1].config["rc"] == (1, 1, 1, 1)
    assert kinds("SSA")[1].config["rc"] != (1, 1, 1, 1)
    assert kinds("WSA & SWSA (Swin)")[0] == [[WSA, SWSA]] * 4
    assert kinds("WSA & SSA, r_c = 1 (Twins)")[1].config["rc"] == (1, 1, 1, 1)
    assert kinds("IWSA & SSA, no PEG")[1].stages[0].peg is None


def test_the_table_has_means_intervals_and_what_is_missing(tmp_path, capsys):
    for seed, score in enumerate((50.0, 52.0, 54.0)):
        folder = tmp_path / f"IWSASSA_{seed}"
        folder.mkdir()
        (folder / "log.jsonl").write_text(json.dumps(dict(score=1)) + "\n" + json.dumps(dict(score=score)) + "\n")
    ablation_mosaics.main(["--table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(ablation_mosaics.ROWS)
    assert "| IWSA & SSA | 52.0 ± 5.0 | 44.9 |" in lines            # 4.303 · 2 / √3
    assert "| WSA | 0 of 3 runs | 38.9 |" in lines


@pytest.mark.slow
def test_a_row_is_trained_with_its_backbone_and_seed(tmp_path, monkeypatch, capsys):
    import torch
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "data" / split / name / "0.png")
    monkeypatch.setattr(ablation_mosaics, "ROWS", {"LEM & SSA": ablation_mosaics.ROWS["LEM & SSA"]})
    monkeypatch.setattr(ablation_mosaics, "SEEDS", 2)
    ablation_mosaics.main(["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--size", "32",
                           "--mosaics", "8", "--batch-size", "2", "--steps", "1", "--width", "8"])
    for seed in range(2):
        state = torch.load(tmp_path / f"LEMSSA_{seed}" / "last.pt", weights_only=True)
        assert state["config"]["pattern"] == ("lem", "ssa")
        assert state["settings"]["seed"] == seed
    assert "| LEM & SSA | " in capsys.readouterr().out
