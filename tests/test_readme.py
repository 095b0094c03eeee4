"""README.md and docs/*.md: Python blocks run, command lines match the programs, names, numbers and links are right."""
import inspect
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch

import scalablevit

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES
          for block in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)]
TABLES = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
          for table in re.findall(r"(?:^\|.*\|$\n?)+", README, re.MULTILINE)]           # rows of cells
OPTIONAL = {"scalablevit_kernels", "torchvision", "matplotlib", "torchmetrics", "pycocotools", "onnx", "onnxruntime",
            "onnxscript", "timm"}


def run(call):
    """Skip the test if an optional package is missing."""
    try:
        call()
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")


def slow(code):
    """Exporting takes most of a minute."""
    return [pytest.mark.slow] if "onnx" in code or "torch.export" in code else []


@pytest.mark.parametrize("code", [
    pytest.param(code, marks=slow(code)) for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)                                # for docs/
    monkeypatch.chdir(tmp_path)                                      # for the files they write, and those they read:
    if "runs/tiny/best.pt" in code:
        shutil.copy(ROOT / "docs" / "cat.jpg", "photo.jpg")
        (tmp_path / "runs" / "tiny").mkdir(parents=True)
        model = scalablevit.scalablevit_tiny(num_classes=2)
        torch.save({"model": model.state_dict(), "config": model.config, "classes": ["cat", "dog"],
                    "settings": {"size": 112}}, "runs/tiny/best.pt")
    run(lambda: exec(compile(code, "README.md", "exec"), {}))


def command_lines():
    """{program: flags used in the pages}"""
    programs = {}
    for language, code in BLOCKS:
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            for i, word in enumerate(words):
                if word.endswith(".py"):
                    flags = {w.partition("=")[0] for w in words[i:] if w.startswith("--")}
                    programs.setdefault(word, set()).update(flags)
                    break
    return programs


@pytest.mark.parametrize("program, flags", sorted(command_lines().items()))
def test_flags_of_the_command_lines_exist(program, flags, monkeypatch, capsys):
    assert (ROOT / program).is_file()
    if flags:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])     # as in python program.py

        def help():
            with pytest.raises(SystemExit):
                runpy.run_path(str(ROOT / program), run_name="__main__")

        run(help)
        assert flags <= set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


# ------------------------------------------------------------------------------------------------ names, numbers, links
def test_the_table_of_the_paper_names_what_is_in_the_file():
    """The table headed | paper | in `scalablevit.py` | names every class, and only names that exist."""
    rows = [table[2:] for table in TABLES if table[0][0] == "paper" and "scalablevit.py" in table[0][1]]
    assert len(rows) == 1, "there is no table (or more than one) with the heading | paper | in `scalablevit.py` |"
    named = {name for row in rows[0] for name in re.findall(r"`(\w+)`", row[1])}
    arguments = {*inspect.signature(scalablevit.ScalableViT).parameters}
    assert {name for name in named - arguments if not hasattr(scalablevit, name)} == set(), "not in scalablevit.py"
    classes = {name for name, member in vars(scalablevit).items()
               if inspect.isclass(member) and member.__module__ == "scalablevit"}
    assert classes - named == set(), "in scalablevit.py, but not in the README's table"


@pytest.mark.parametrize("name", ["tiny", "s", "b", "l"])
def test_the_numbers_are_those_of_the_models(name):
    """The row that begins with the model's name has its parameters and its MACs, to the number of decimals given."""
    with torch.device("meta"):
        model = getattr(scalablevit, f"scalablevit_{name}")()
    cost = scalablevit.count_macs(model, (224, 224))
    costs = [cost["modules"] / 1e9, sum(cost.values()) / 1e9]
    rows = [" ".join(row) for table in TABLES for row in table
            if row[0].strip("`").lower().removeprefix("scalablevit_") == name]
    rows = [row for row in rows if f"{sum(p.numel() for p in model.parameters()):,}" in row]
    assert rows, "no row of a table begins with the model's name and has this number of parameters"
    for row in rows:
        for decimals in re.findall(r"\d\.(\d{2,}) ?G\b", row):
            assert [f"{c:.{len(decimals)}f}" in row for c in costs] == [True, True]


def headings(page):
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links to files and to headings exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            file, _, place = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists() and (not place or place in headings(linked)), target
