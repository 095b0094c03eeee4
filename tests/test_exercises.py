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
EXERCISES = [file.stem for file in sorted((TESTS / "exercises").glob("[1-9]_*.py"))]
SOLVED = EXERCISES[:-1]
sys.path.insert(0, str(TESTS / "exercises"))

import report


def run(folder, names, solved=False):
    """Run exercises in a copy of what they import, after applying their patches."""
    shutil.copy(TESTS.parent / "scalablevit.py", folder)
    shutil.copytree(TESTS, folder / "tests", ignore=shutil.ignore_patterns("cuda_on_cpu", "__pycache__"))
    for name in names if solved else ():
        patch = f"tests/exercises/solutions/{name}.patch"
        subprocess.run(["git", "apply", "-C1", patch], cwd=folder, check=True)
    files = [f"tests/exercises/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVED)
def test_an_exercise_is_solved_by_its_patch(name, tmp_path):
    result = run(tmp_path, [name], solved=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_no_exercise_is_solved_yet(tmp_path):
    output = run(tmp_path, SOLVED).stdout
    assert [name for name in SOLVED if f"FAILED tests/exercises/{name}.py" not in output] == []


# ---------------------------------------------------------------------------- what is reported
def failure(check, found, expected):
    check(expected.clone(), expected)                               # passes
    with pytest.raises(pytest.fail.Exception) as failed:
        check(found, expected)
    return str(failed.value)


def test_a_map_shows_what_is_missing_and_what_is_too_much():
    expected = torch.zeros(2, 3, 2, 3, dtype=torch.bool)
    expected[1, 0, :, 0] = True
    sees = expected.clone()
    sees[1, 0, 0, 0] = False
    sees[1, 0, 1, 2] = True
    message = failure(report.same_tokens, sees, expected)
    assert "1 of 6 tokens" in message
    assert "(1, 0)" in message
    assert message.endswith("x . .\n. . +")


def test_differences_of_numbers_are_described():
    numbers = torch.randn(1, 2, 3, 4)
    assert "is 2 everywhere" in failure(report.same_numbers, 2 * numbers, numbers)
    assert "the shape is (1, 1, 3, 4)" in failure(report.same_numbers, numbers[:, :1], numbers)
    wrong = numbers.clone()
    wrong[0, 1, 2, 0] += 1
    message = failure(report.same_numbers, wrong, numbers)
    assert "up to 1" in message
    assert message.endswith(". . .\n. . x")
