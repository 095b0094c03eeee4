"""docs/lesson.ipynb: it runs from top to bottom, and is kept with its outputs.

    python tests/test_lesson.py             runs it anew and saves it with the outputs, in a few minutes

Running it takes nbclient and ipykernel, and what it imports: pip install '.[test]'
"""
import html
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = pathlib.Path(__file__).parents[1]
LESSON = ROOT / "docs" / "lesson.ipynb"
sys.path.insert(0, str(LESSON.parent))

import ablation

CELLS = nbformat.read(LESSON, as_version=4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
PROGRAM = "\n".join(cell.source for cell in CODE)
OUTPUTS = [output for cell in CODE for output in cell.outputs]
DATA = [output.get("data", {"text/plain": output.get("text", "")}) for output in OUTPUTS]
PRINTED = "".join(text for data in DATA for kind, text in data.items() if kind != "image/png")


def run():
    """-> the notebook with fresh outputs.  Raises nbclient's CellExecutionError where a cell fails."""
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(LESSON, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True, record_timing=False,
        resources={"metadata": {"path": str(LESSON.parent)}})
    with tempfile.TemporaryDirectory() as folder:                   # in place of the user's IPython profile
        client.execute(env=os.environ | {"IPYTHONDIR": folder, "OMP_NUM_THREADS": "1"})
    notebook.metadata.language_info = {"name": "python"}            # of any version
    return notebook


@pytest.mark.slow
def test_it_runs_from_top_to_bottom():
    run()


def is_hidden(cell):
    return "hide-input" in cell.metadata.get("tags", [])


def is_skipped(cell):
    return cell.metadata.slideshow.slide_type == "skip"


def test_cells_fit_a_screen():
    assert [cell.source for cell in CODE if len(cell.source.splitlines()) > 12] == []
    lines = (PROSE + PROGRAM).splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_it_fits_45_minutes():
    """The parts' minutes leave five for questions, and what can be left out comes last in its part."""
    minutes = re.findall(r"^## .*\b(\d+) minutes?\b", PROSE, re.MULTILINE)
    assert len(minutes) == len(re.findall(r"^## ", PROSE, re.MULTILINE))
    assert sum(map(int, minutes)) == 40
    for part in re.split(r"^## ", PROSE, flags=re.MULTILINE):
        sections = re.findall(r"^\*\*[^*]+\*\*.*", part, re.MULTILINE)
        optional = ["(optional)" in section for section in sections]
        assert optional == sorted(optional), part


def test_a_question_comes_before_each_picture_and_its_answer_after():
    """Questions and answers take turns; a picture that is not skipped comes after a question of its part."""
    is_open = False
    previous = ""
    for cell in CELLS:
        text = cell.source
        for mark in re.findall(r"\*\*(Question|Answer)\.\*\*", text):
            assert is_open == (mark == "Answer"), text
            is_open = mark == "Question"
        if (is_hidden(cell) or "![" in text or "<img" in text) and not is_skipped(cell):
            assert is_open or "**Answer.**" in previous, text
        previous = text
    assert not is_open


@pytest.mark.slow
def test_it_becomes_slides(tmp_path):
    """With nbconvert, as docs/README.md says: a slide for each part, no code of the cells that only draw."""
    pytest.importorskip("nbconvert")
    page = (LESSON.parent / "README.md").read_text().replace("\\\n", "")
    command, = re.findall(r"^jupyter (nbconvert .*)$", page, re.MULTILINE)
    command = command.replace("docs/lesson.ipynb", str(LESSON))
    subprocess.run([sys.executable, "-m", *command.split(), "--output-dir", str(tmp_path)], check=True)
    slides = html.unescape((tmp_path / "lesson.slides.html").read_text(encoding="utf-8"))
    for heading in re.findall(r"^## ([^(\n]+)", PROSE, re.MULTILINE):
        assert heading.strip() in slides
    shown = re.sub(r"<[^>]*>", "", slides)                          # without the colors of the code
    assert len([cell for cell in CODE if is_hidden(cell)]) >= 8
    for cell in CODE:
        first = cell.source.splitlines()[0]
        if not is_skipped(cell):
            assert (first in shown) != is_hidden(cell), first


def test_the_network_of_part_7_classifies_well():
    accuracies = re.findall(r"^epoch \d+ .*top-1 ([\d.]+) %", PRINTED, re.MULTILINE)
    assert len(accuracies) == 8
    assert float(accuracies[-1]) > 90


def test_the_table_is_that_of_the_results():
    assert ablation.overview() in PRINTED


def test_readings_quote_the_table():
    """After "Local:" or "Global:", `*ROW* 94.0 %` is the row's mean final accuracy on that task."""
    means = {}
    for line in ablation.overview().splitlines()[2:]:
        name, means[name, "Local"], means[name, "Global"], *_ = line.strip("| ").split(" | ")
    quoted = 0
    for task, sentence in re.findall(r"(Local|Global): ((?:[^.]|\.\d)+)", PROSE.replace("\n", " ")):
        for name, figure in re.findall(r"\*([^*]+)\* ([\d.]+) %", sentence):
            assert means[name, task] == figure
            quoted += 1
    assert quoted >= 8


def test_it_is_kept_with_the_outputs_of_one_run():
    """No errors, no warnings, no absolute paths, which tell where it was run, no drawings on black paper."""
    assert [cell.execution_count for cell in CODE] == [*range(1, len(CODE) + 1)]
    shows = re.compile(r"plt\.plot|figures\.\w+\(|loglog|print\(|Markdown\(|SVG\(|^%run", re.MULTILINE)
    assert [cell for cell in CODE if shows.search(cell.source) and not cell.outputs] == []
    assert [output for output in OUTPUTS if output.output_type == "error"] == []
    assert [output for output in OUTPUTS if output.get("name") == "stderr"] == []
    assert re.findall(r"(?<![\w./:<])/(?:[\w.-]+/)+|\b[A-Z]:\\", PRINTED) == []
    assert "prefers-color-scheme" not in PRINTED
    assert LESSON.stat().st_size < 1e6


def test_links_lead_to_files_and_every_exercise_is_linked():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE) if "://" not in link]
    assert [link for link in links if not (LESSON.parent / link.partition("#")[0]).is_file()] == []
    exercises = {f"../{file.relative_to(ROOT).as_posix()}" for file in ROOT.glob("tests/exercises/[1-9]*.py")}
    assert exercises - set(links) == set()


def test_it_defines_nothing_that_the_code_has():
    """It imports scalablevit.py and docs/ instead of repeating them."""
    files = [ROOT / "scalablevit.py", *ROOT.glob("docs/*.py")]
    own, theirs = (set(re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE))
                   for text in (PROGRAM, "\n".join(file.read_text() for file in files)))
    assert own & theirs == set()


if __name__ == "__main__":
    nbformat.write(run(), LESSON)
