"""docs/ablation.py: the tasks' answers by another way, when a run ends, what is kept of it, and intervals."""
import itertools
import pathlib
import re
import statistics
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import ablation
from scalablevit import ScalableViT

TOKENS = [*itertools.product(range(8), repeat=2)]
few = settings(max_examples=12)
seeds = st.integers(0, 10 ** 6)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Runs of four updates, and a results file of their own."""
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    for name, value in dict(batch=4, warmup=2, cooldown=2, every=2, cap=4).items():
        monkeypatch.setitem(ablation.SETTING, name, value)


# ---------------------------------------------------------------------------- rows and tasks
def test_the_rows_are_networks_of_their_own():
    assert len({str(ScalableViT(**ablation.NET | row[0])) for row in ablation.ROWS.values()}) == 12


@few
@given(seeds)
def test_a_token_names_the_colors_within_two_steps(seed):
    boards, labels = ablation.draw_local(1, torch.Generator().manual_seed(seed))
    color = {place: int(boards[0, 0][place] > 0) for place in TOKENS}
    assert len(set(ablation.NEAR)) == 12
    for (down, right), answers in zip(ablation.NEAR, labels[0].tolist()):
        assert abs(down) + abs(right) in (1, 2)
        for y, x in TOKENS:
            assert answers[y][x] == color.get((y + down, x + right), -1)


@few
@given(seeds)
def test_a_question_is_answered_by_the_item_that_has_its_code(seed):
    """Items are found by their hue alone, answers by their code alone."""
    boards, labels = ablation.draw_global(1, torch.Generator().manual_seed(seed))
    code, hue, question = (part.permute(1, 2, 0).tolist() for part in boards[0].split([16, 4, 16]))
    items = [(y, x) for y, x in TOKENS if any(hue[y][x])]
    assert sorted((y // 2, x // 2) for y, x in items) == [*itertools.product(range(4), repeat=2)]
    hues = {}
    for y, x in items:
        hues.setdefault(tuple(code[y][x]), set()).add(hue[y][x].index(1))
    for y, x in TOKENS:
        answer = labels[0, 0, y, x].item()
        if (y, x) in items:
            assert answer == -1
            assert not any(question[y][x])
            bits_apart = [sum(a != b for a, b in zip(code[y][x], code[v][u])) for v, u in items]
            assert 1 in bits_apart                                  # its twin
        else:
            assert answer in hues[tuple(question[y][x])]
            assert not any(code[y][x])


# ---------------------------------------------------------------------------- runs
@pytest.mark.parametrize("task", ablation.TASKS)
def test_every_row_sees_the_same_boards(task, short, monkeypatch):
    draw, *rest = ablation.TASKS[task]
    seen = []

    def record(n, generator):
        boards, labels = draw(min(n, 32), generator)
        seen.append(boards)
        return boards, labels

    monkeypatch.setitem(ablation.TASKS, task, (record, *rest))
    for row, seed in (("SSA", 3), ("IWSA & SSA", 3), ("SSA", 4)):
        run = ablation.train(row, task, seed)
        assert run["updates"] == 4
        assert run["area"] == pytest.approx(statistics.mean(run["curve"]))
    same_seed, other_seed = [[torch.equal(a, b) for a, b in zip(seen, seen[i:i + 8])] for i in (8, 16)]
    assert same_seed == [True] * 8
    assert other_seed == [True] * 2 + [False] * 6                   # validation and test boards are shared


@given(st.lists(st.sampled_from([30.0, 30.25, 30.5, 31.0]), min_size=1, max_size=19))
def test_a_run_goes_on_while_it_rises(curve):
    """Stopped exactly if eight evaluations in a row have not lifted the best figure by half a point."""
    flat = len(curve) > 8 and max(curve[-8:]) < max(curve[:-8]) + 0.5
    assert ablation.stopped(curve) == flat
    assert ablation.stopped([*curve, 99.95])
    assert ablation.stopped(curve + [30.0] * (20 - len(curve)))


def test_a_stopped_ablation_goes_on(short, monkeypatch, capsys):
    trained = []

    def train(row, task, seed):
        trained.append((row, task, seed))
        return {"final": 10.0 * seed, "updates": 2, "to_95": 2 if seed else None, "area": 1.0, "seconds": 0}

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--seeds", "2", "--results", str(ablation.RESULTS)])
    ablation.run("SSA", "local", 1)
    with monkeypatch.context() as other:
        other.setitem(ablation.SETTING, "cap", 1)
        ablation.run("SSA", "local", 0)             # under another setting: does not count, is not lost
    ablation.main()
    wanted = {*itertools.product(ablation.ROWS, ablation.TASKS, (0, 1))} - {("SSA", "local", 1)}
    assert sorted(trained[2:]) == sorted(wanted)
    assert len(ablation.RESULTS.read_text().splitlines()) == 49
    row = "| SSA | 5.0 ± 7.1 | 2 (1) | 1.0 | 5.0 ± 7.1 | 2 (1) | 1.0 | 44.4 | 82.9 |"
    assert row in capsys.readouterr().out


# ---------------------------------------------------------------------------- tables
@few
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=5))
def test_the_interval_is_that_of_all_resamples(values):
    """All n^n of them, instead of some drawn: 2.5 % of the means lie below, 2.5 % above."""
    low, high = ablation.interval(values)
    means = torch.tensor([*itertools.product(values, repeat=len(values))], dtype=torch.float64).mean(1)
    for side, end in ((means, low), (-means, -high)):
        assert (side < end - 1e-9).double().mean() < 0.033
        assert (side <= end + 1e-9).double().mean() > 0.017


def test_the_shipped_tables_are_on_the_page():
    """All runs of the present setting are in the results file; the page shows what the program prints."""
    assert {*ablation.finished()} == {*itertools.product(ablation.ROWS, ablation.TASKS, range(5))}
    page = (ablation.DOCS / "ablation.md").read_text()
    assert ablation.table() in page
    assert ablation.differences() in page
    assert re.findall(r"\| -[\d.]+ \|", page) == []               # in the paper, the first row is ahead


def test_differences_are_paired_by_seed(monkeypatch):
    """Seeds 10 points apart cancel out; a seed that only one row has is left out."""
    runs = {"first": {0: 42, 1: 53, 2: 64}, "second": {0: 40, 1: 50, 2: 60, 3: 0}}
    monkeypatch.setattr(ablation, "figures", lambda row, task, key: runs[row])
    assert ablation.difference("first", "second", "local") == (3, *ablation.interval([2, 3, 4]), "appears")


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    ablation.curves(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
