"""tests/exercises: each can be solved by its patch, fails without it, and says where it fails.

A solution is applied to a copy of the repository's files.  The last exercise, a kernel, has none.
"""
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
EXERCISES = sorted((TESTS / "exercises").glob("[1-9]_*.py"))
SOLUTIONS = sorted((TESTS / "exercises" / "solutions").glob("*.patch"))
sys.path.insert(0, str(TESTS / "exercises"))

import report


def run(folder, *names, patch=None):
    """Run exercises in a copy of what they import, after applying a patch."""
    shutil.copy(TESTS.parent / "scalablevit.py", folder)
    (folder / "tests").mkdir()
    for file in ("conftest.py", "helpers.py", "test_receptive_field.py"):
        shutil.copy(TESTS / file, folder / "tests")
    shutil.copytree(TESTS / "exercises", folder / "tests" / "exercises")
    if patch:
        subprocess.run(["git", "apply", "-C1", str(patch)], cwd=folder, check=True)
    files = [f"tests/exercises/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda file: file.stem)
def test_an_exercise_is_solved_by_its_patch(solution, tmp_path):
    result = run(tmp_path, solution.stem, patch=solution)
    assert result.returncode == 0, result.stdout


def test_no_exercise_is_solved_yet(tmp_path):
    names = [file.stem for file in SOLUTIONS]
    result = run(tmp_path, *names)
    assert [name for name in names if f"FAILED tests/exercises/{name}.py" not in result.stdout] == []


def test_every_exercise_but_the_last_has_a_solution():
    assert [file.stem for file in SOLUTIONS] == [file.stem for file in EXERCISES][:-1]


# ------------------------------------------------------------------------------------------------ what is reported
def test_a_map_shows_what_is_missing_and_what_is_too_much():
    expected = torch.zeros(2, 3, 2, 3, dtype=torch.bool)
    expected[1, 0, :, 0] = True
    sees = expected.clone()
    report.same_tokens(sees, expected)
    sees[1, 0, 0, 0] = False
    sees[1, 0, 1, 2] = True
    with pytest.raises(pytest.fail.Exception) as failure:
        report.same_tokens(sees, expected)
    assert "1 of 6 tokens" in str(failure.value)
    assert "(1, 0)" in str(failure.value)
    assert str(failure.value).endswith("x . .\n. . +")


def test_a_constant_factor_is_named():
    numbers = torch.randn(1, 2, 3, 4)
    with pytest.raises(pytest.fail.Exception, match="the ratio to what it should be is 2 everywhere"):
        report.same_numbers(2 * numbers, numbers)


def test_other_differences_are_drawn():
    numbers = torch.randn(1, 2, 3, 4)
    report.same_numbers(numbers.clone(), numbers)
    wrong = numbers.clone()
    wrong[0, 1, 2, 0] += 1
    with pytest.raises(pytest.fail.Exception) as failure:
        report.same_numbers(wrong, numbers)
    assert "up to 1" in str(failure.value)
    assert str(failure.value).endswith(". . .\n. . x")
    with pytest.raises(pytest.fail.Exception, match="the shape is"):
        report.same_numbers(numbers[:, :1], numbers)
