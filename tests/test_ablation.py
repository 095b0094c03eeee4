"""docs/ablation.py: the tasks' answers by another way, when a run ends, what is kept of it, and intervals."""
import itertools
import json
import pathlib
import statistics
import sys

import pytest
import torch
from hypothesis import given, strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import ablation
from scalablevit import ScalableViT

SHORT = dict(batch=4, warmup=2, cooldown=2, every=2, cap=4)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Runs of four updates, and a results file of their own."""
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    for name, value in SHORT.items():
        monkeypatch.setitem(ablation.SETTING, name, value)


def write(path, final):
    """A results file of all rows and tasks, seeds 0 to 4, with the final figures that `final` (row, task, seed) has."""
    path.write_text("".join(
        json.dumps({"row": row, "task": task, "seed": seed, "final": final(row, task, seed), "to_95": None,
                    "area": 50.0, "curve": [40.0, 60.0], "setting": ablation.setting()}) + "\n"
        for row, task, seed in itertools.product(ablation.ROWS, ablation.TASKS, range(5))))


# ------------------------------------------------------------------------------------------------ rows and claims
def test_the_rows_are_networks_of_their_own():
    assert len({str(ScalableViT(**ablation.NET | arguments)) for arguments, *_ in ablation.ROWS.values()}) == 12


def test_the_paper_claims_what_is_claimed():
    """In every figure that the paper has for both rows, the first is ahead or level."""
    for first, second in ablation.CLAIMS:
        (_, *ours), (_, *theirs) = ablation.ROWS[first], ablation.ROWS[second]
        gains = [a - b for a, b in zip(ours, theirs) if a and b]
        assert min(gains) >= 0 < max(gains)


# ------------------------------------------------------------------------------------------------ tasks
@given(st.integers(0, 10 ** 6))
def test_a_cell_names_the_colors_within_two_steps(seed):
    boards, labels = ablation.draw_local(1, torch.Generator().manual_seed(seed))
    board, labels = boards[0, 0].tolist(), labels[0].tolist()
    assert len({*ablation.NEAR}) == 12 and all(abs(down) + abs(right) in (1, 2) for down, right in ablation.NEAR)
    for (q, (down, right)), y, x in itertools.product(enumerate(ablation.NEAR), range(8), range(8)):
        inside = 0 <= y + down < 8 and 0 <= x + right < 8
        assert labels[q][y][x] == (board[y + down][x + right] > 0 if inside else -1)


@given(st.integers(0, 10 ** 6))
def test_a_question_is_answered_by_the_item_that_has_its_code(seed):
    """Items are found by their hue alone, answers by their code alone."""
    boards, labels = ablation.draw_global(1, torch.Generator().manual_seed(seed))
    code, hue, question = (channels.permute(1, 2, 0).tolist() for channels in boards[0].split([16, 4, 16]))
    cells = [*itertools.product(range(8), repeat=2)]
    items = [(y, x) for y, x in cells if any(hue[y][x])]
    assert [(y // 2, x // 2) for y, x in sorted(items, key=lambda item: (item[0] // 2, item[1] // 2))] \
        == [*itertools.product(range(4), repeat=2)]                                         # one in each square
    hues = {}
    for y, x in items:
        hues.setdefault(tuple(code[y][x]), set()).add(hue[y][x].index(1))
    for y, x in cells:
        if (y, x) in items:
            bits_apart = [sum(a != b for a, b in zip(code[y][x], code[v][u])) for v, u in items]
            assert labels[0, 0, y, x] == -1 and not any(question[y][x]) and 1 in bits_apart     # its twin
        else:
            assert labels[0, 0, y, x].item() in hues[tuple(question[y][x])] and not any(code[y][x])


# ------------------------------------------------------------------------------------------------ runs
@pytest.mark.parametrize("task", ablation.TASKS)
def test_a_seed_gives_the_same_run_again_and_every_row_the_same_boards(task, short, monkeypatch):
    draw, seen = ablation.TASKS[task][0], []

    def record(n, generator):
        boards, labels = draw(min(n, 32), generator)
        seen.append(boards)
        return boards, labels

    monkeypatch.setitem(ablation.TASKS, task, (record, *ablation.TASKS[task][1:]))
    runs = [ablation.train(row, task, seed) for row, seed in (("SSA", 3), ("SSA", 3), ("IWSA & SSA", 3), ("SSA", 4))]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1] and runs[0]["curve"] != runs[3]["curve"]
    first, again, other_row, other_seed = (seen[8 * i:8 * i + 8] for i in range(4))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, other_row))
    same = [torch.equal(a, d) for a, d in zip(first, other_seed)]
    assert same == [True, True] + 6 * [False]                       # validation and test, then four updates and two
    assert runs[0]["area"] == pytest.approx(sum(runs[0]["curve"]) / 2) and runs[0]["updates"] == 4


@given(st.lists(st.floats(20, 99.8), min_size=1, max_size=19))
def test_a_run_goes_on_while_it_rises(curve):
    """Stopped exactly if eight evaluations in a row have not lifted the best figure by half a point."""
    best_before = [max(curve[:i]) for i in range(1, len(curve) + 1)]
    flat = len(curve) > 8 and all(x < best_before[-9] + 0.5 for x in curve[-8:])
    assert ablation.stopped(curve) == flat
    assert ablation.stopped([*curve, 99.95]) and ablation.stopped(curve + [30.0] * (20 - len(curve)))


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
        ablation.run("SSA", "local", 0)                             # under another setting: does not count, is not lost
    ablation.main()
    wanted = {*itertools.product(ablation.ROWS, ablation.TASKS, (0, 1))} - {("SSA", "local", 1)}
    assert sorted(trained[2:]) == sorted(wanted)
    assert len(ablation.RESULTS.read_text().splitlines()) == 49
    assert "| SSA | 5.0 ± 7.1 | 2 (1) | 1.0 | 5.0 ± 7.1 | 2 (1) | 1.0 | 44.4 | 82.9 |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ figures
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=5))
def test_the_interval_is_that_of_all_resamples(values):
    """All n^n of them, instead of some drawn: 2.5 % of the means lie below, 2.5 % above."""
    low, high = ablation.interval(values)
    means = torch.tensor([*itertools.product(values, repeat=len(values))], dtype=torch.float64).mean(1)
    assert (means < low - 1e-9).double().mean() < 0.033 and (means <= low + 1e-9).double().mean() > 0.017
    assert (means > high + 1e-9).double().mean() < 0.033 and (means >= high - 1e-9).double().mean() > 0.017


def test_differences_are_paired_by_seed_and_judged(monkeypatch, tmp_path):
    """Seeds 10 points apart cancel out; a gain of -1 to 1 is told from one of 2 to 4, and of one that is negative."""
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    gain = {"IWSA": lambda seed: 2 + seed / 2, "SSA": lambda seed: (seed - 2) / 2, "WSA & SSA": lambda seed: -1 - seed,
            "IWSA & SSA, no PEG": lambda seed: 60 - 10 * seed, "IWSA & SSA": lambda seed: 59.5 - 10 * seed}
    write(ablation.RESULTS, lambda row, task, seed: 40.0 + 10 * seed + gain.get(row, lambda seed: 0)(seed))
    lines = ablation.differences().splitlines()
    for first, second, mean, verdict in (("IWSA", "WSA", 3, "appears"), ("SSA", "WSA", 0, "absent"),
                                         ("WSA & SSA", "WSA & SSA, no PEG", -3, "reversed"),
                                         ("IWSA & SSA", "IWSA & SSA, no PEG", -0.5, "ceiling")):
        found, low, high, said = ablation.difference(first, second, "local")
        assert (found, said) == (pytest.approx(mean), verdict) and low - 1e-9 <= found <= high + 1e-9
        line, = (line for line in lines if line.startswith(f"| {first} − {second} |"))
        assert line.split(" | ")[1] == line.split(" | ")[2] == f"{found:+.1f} [{low:+.1f}, {high:+.1f}] {said}"


def test_the_shipped_table_is_on_the_page():
    """All runs of the present setting are in the results file; the page shows what the program prints."""
    runs = ablation.finished()
    assert {*runs} == {*itertools.product(ablation.ROWS, ablation.TASKS, range(5))}
    page = pathlib.Path(ablation.__file__).with_suffix(".md").read_text()
    assert ablation.table() in page and ablation.differences() in page
    for row in ablation.ROWS:
        finals = [runs[row, "local", seed]["final"] for seed in range(5)]
        assert f"| {row} | {statistics.mean(finals):.1f} ± {statistics.stdev(finals):.1f} |" in ablation.table()


def test_curves_are_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    write(ablation.RESULTS, lambda row, task, seed: 40.0)
    ablation.curves(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
