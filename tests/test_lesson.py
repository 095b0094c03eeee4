"""docs/lesson.ipynb: it runs from top to bottom, and is kept with its outputs.

    python tests/test_lesson.py             runs it anew and saves it with the outputs, in a few minutes

Running it takes nbclient and ipykernel, and torchvision and matplotlib for what it imports: pip install '.[test]'
"""
import html
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LESSON = ROOT / "docs" / "lesson.ipynb"
sys.path.insert(0, str(LESSON.parent))
CELLS = json.loads(LESSON.read_text())["cells"]
CODE, PROSE = ([cell for cell in CELLS if cell["cell_type"] == kind] for kind in ("code", "markdown"))


def run():
    """-> the notebook with fresh outputs.  Raises nbclient's CellExecutionError where a cell fails."""
    import nbclient
    import nbformat
    notebook = nbformat.read(LESSON, as_version=4)
    with tempfile.TemporaryDirectory() as folder:                    # in place of the user's IPython profile
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True,
                                         record_timing=False, resources={"metadata": {"path": str(LESSON.parent)}})
        client.execute(env=os.environ | {"IPYTHONDIR": folder, "OMP_NUM_THREADS": "1"})
    return notebook


def save(notebook):
    """Without the version of Python that ran it."""
    import nbformat
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
    part = LESSON.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(LESSON)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom():
    for package in ("nbclient", "ipykernel", "matplotlib", "torchvision"):
        pytest.importorskip(package)
    run()


def source(cell):
    return "".join(cell["source"])


def texts(cell):
    """The outputs of a cell that can be read: all but pictures of pixels."""
    for output in cell["outputs"]:
        for kind, text in output.get("data", {"text/plain": output.get("text", "")}).items():
            if kind != "image/png":
                yield "".join(text)


def test_cells_are_short():
    assert [source(cell) for cell in CODE if len(source(cell).splitlines()) > 12] == []


def test_it_fits_45_minutes():
    """The parts' minutes leave five for questions, and what can be left out comes last in its part."""
    headings = [line for cell in PROSE for line in source(cell).splitlines() if line.startswith("## ")]
    minutes = [re.findall(r"(\d+) minutes?\b", heading) for heading in headings]
    assert [heading for heading, found in zip(headings, minutes) if len(found) != 1] == []
    assert sum(int(found) for found, in minutes) == 40
    optional = False
    for line in "\n".join(map(source, PROSE)).splitlines():
        section = re.match(r"\*\*[^*]+\*\*", line)
        assert not (optional and section and "(optional)" not in line), line
        optional = not line.startswith("## ") and (optional or bool(section) and "(optional)" in line)


def test_a_question_comes_before_each_picture_and_its_answer_after():
    """Questions and answers take turns; a picture that is not skipped comes after the first question of its part."""
    open_question = False
    for cell in CELLS:
        text = source(cell)
        for mark in re.findall(r"\*\*(Question|Answer)\.\*\*", text):
            assert open_question == (mark == "Answer"), text
            open_question = mark == "Question"
        draws = "hide-input" in cell["metadata"].get("tags", []) or "![" in text
        follows = CELLS[CELLS.index(cell) - 1]
        if draws and cell["metadata"]["slideshow"]["slide_type"] != "skip":
            assert open_question or "**Answer.**" in source(follows), text
    assert not open_question


@pytest.mark.slow
def test_it_becomes_slides(tmp_path):
    """With nbconvert, as the page says: a slide for each part, and no code of the cells that only draw."""
    pytest.importorskip("nbconvert")
    command, = re.findall(r"^    jupyter (nbconvert .*)$", "\n".join(map(source, PROSE)), re.MULTILINE)
    command = command.replace("lesson.ipynb", str(LESSON))
    subprocess.run([sys.executable, "-m", *command.split(), "--output-dir", str(tmp_path)], check=True)
    slides = (tmp_path / "lesson.slides.html").read_text(encoding="utf-8")
    for cell in PROSE:
        for heading in re.findall(r"^## ([^(\n]+)", source(cell), re.MULTILINE):
            assert heading.strip() in html.unescape(slides)
    shown = re.sub(r"<[^>]*>", "", html.unescape(slides))            # without the colors of the code
    hidden = [cell for cell in CODE if "hide-input" in cell["metadata"].get("tags", [])]
    assert len(hidden) >= 8
    for cell in CODE:
        first = source(cell).splitlines()[0]
        skipped = cell["metadata"]["slideshow"]["slide_type"] == "skip"
        if not skipped:
            assert (first in shown) == (cell not in hidden), first


def test_the_network_of_part_7_classifies_well():
    """The kept output ends above 90 %."""
    text = "".join(text for cell in CODE for text in texts(cell))
    accuracies = [float(n) for n in re.findall(r"^epoch \d+ .*top-1 ([\d.]+) %", text, re.MULTILINE)]
    assert len(accuracies) == 8
    assert accuracies[-1] > 90


def test_the_table_is_that_of_the_results():
    """The kept output has the means of docs/ablation.jsonl, row by row as in ablation.py's own table."""
    import ablation
    kept, = ["".join(output["data"].get("text/markdown", "")) for cell in CODE for output in cell["outputs"]
             if "ablation.overview()" in source(cell) and "data" in output]
    assert kept == ablation.overview()
    full = [line.strip("| ").split(" | ") for line in ablation.table().splitlines()]
    brief = [line.strip("| ").split(" | ") for line in kept.splitlines()]
    assert [[name, *[re.findall(r"([\d.]+) ±", cell)[0] for cell in (local, distant)], top1, miou]
            for name, local, _, _, distant, _, _, miou, top1 in full[2:]] == brief[2:]


def test_readings_quote_the_table():
    """After "Local:" or "Global:", `*ROW* 94.0 %` is the row's mean final accuracy on that task."""
    import ablation
    text = " ".join("\n".join(map(source, PROSE)).split())
    sentences = re.findall(r"(Local|Global): ((?:[^.]|\.\d)+)", text)
    quoted = [(row, task.lower(), figure) for task, sentence in sentences
              for row, figure in re.findall(r"\*([^*]+)\* ([\d.]+) %", sentence)]
    assert len(quoted) >= 8 and {row for row, *_ in quoted} <= {*ablation.ROWS}
    for row, task, figure in quoted:
        assert figure == f"{statistics.mean(ablation.figures(row, task, 'final').values()):.1f}"


def test_lines_fit_a_screen():
    lines = [line for cell in CELLS for line in source(cell).splitlines()]
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_it_is_kept_with_the_outputs_of_one_run():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    shows = re.compile(r"plt\.plot|figures\.\w+\(|loglog|print\(|Markdown\(|SVG\(|^%run", re.MULTILINE)
    silent = [source(cell) for cell in CODE if shows.search(source(cell)) and not cell["outputs"]]
    assert silent == []


def test_outputs_are_clean():
    """Neither errors nor warnings, nor absolute paths, which tell where it was run."""
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    path = re.compile(r"(?<![\w./:<])/(?:[\w.-]+/)+|\b[A-Z]:\\")
    assert [match.group() for cell in CODE for text in texts(cell) for match in path.finditer(text)] == []
    assert LESSON.stat().st_size < 1e6


def test_links_lead_to_files_and_every_exercise_is_linked():
    links = {link for cell in PROSE for link in re.findall(r"\]\(([^)\s]+)\)", source(cell)) if "://" not in link}
    assert [link for link in links if not (LESSON.parent / link.partition("#")[0]).is_file()] == []
    exercises = {f"../{file.relative_to(ROOT).as_posix()}" for file in ROOT.glob("tests/exercises/[1-9]*.py")}
    assert exercises - links == set()


def test_it_defines_nothing_that_the_code_has():
    """It imports scalablevit.py and docs/ instead of repeating them."""
    defined = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)
    own = {name for cell in CODE for name in defined.findall(source(cell))}
    files = [ROOT / "scalablevit.py", *ROOT.glob("docs/*.py")]
    theirs = {name for file in files for name in defined.findall(file.read_text())}
    assert own & theirs == set()


if __name__ == "__main__":
    save(run())
