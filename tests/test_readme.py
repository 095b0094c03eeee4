"""README.md and docs/*.md: Python blocks run; command lines, names, numbers and links are right."""
import contextlib
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
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = {language: re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
          for language in ("python", "bash")}
TABLES = re.findall(r"(?:^\|.*\|$\n?)+", README, re.MULTILINE)
OPTIONAL = {"scalablevit_kernels", "torchvision", "matplotlib", "torchmetrics", "pycocotools", "timm", "onnx",
            "onnxruntime", "onnxscript"}


@contextlib.contextmanager
def skipped_without_packages():
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")


def slow(code):
    """Exporting takes seconds for each block of the network."""
    return [pytest.mark.slow] if "onnx" in code or "torch.export" in code else []


@pytest.mark.parametrize("code", [pytest.param(code, marks=slow(code)) for code in BLOCKS["python"]])
def test_python_blocks_run(code, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)                               # for docs/
    monkeypatch.chdir(tmp_path)                                     # for the files they write and read:
    if "runs/tiny/best.pt" in code:
        shutil.copy(ROOT / "docs" / "cat.jpg", "photo.jpg")
        model = scalablevit.scalablevit_tiny(num_classes=2)
        pathlib.Path("runs/tiny").mkdir(parents=True)
        torch.save({"model": model.state_dict(), "config": model.config, "classes": ["cat", "dog"],
                    "settings": {"size": 112}}, "runs/tiny/best.pt")
    if slow(code):
        monkeypatch.setitem(scalablevit.TINY, "depths", (2, 1, 1, 1))
    with skipped_without_packages():
        exec(compile(code, "README.md", "exec"), {})


def command_lines():
    """{program: flags used in the pages}"""
    programs = {}
    for line in "".join(BLOCKS["bash"]).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for program in [word for word in words if word.endswith(".py")][:1]:
            flags = [word.partition("=")[0] for word in words[words.index(program):] if word.startswith("--")]
            programs.setdefault(program, set()).update(flags)
    return programs


@pytest.mark.parametrize("program, flags", sorted(command_lines().items()))
def test_flags_of_the_command_lines_exist(program, flags, monkeypatch, capsys):
    assert (ROOT / program).is_file()
    if flags:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        monkeypatch.syspath_prepend((ROOT / program).parent)        # as in python program.py
        with skipped_without_packages(), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        assert flags <= set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


# ---------------------------------------------------------------------------- names, numbers, links
def test_the_table_of_the_paper_names_what_is_in_the_file():
    """The table headed | paper | in `scalablevit.py` | names every class, and only names that exist."""
    table, = [table for table in TABLES if table.startswith("| paper | in `scalablevit.py` |\n")]
    named = set(re.findall(r"`(\w+)`", "".join(table.splitlines(keepends=True)[2:])))
    named -= set(inspect.signature(scalablevit.ScalableViT).parameters)
    assert [name for name in named if not hasattr(scalablevit, name)] == []
    classes = {name for name, member in vars(scalablevit).items()
               if inspect.isclass(member) and member.__module__ == "scalablevit"}
    assert classes - named == set()


@pytest.mark.parametrize("name", ["tiny", "S", "B", "L"])
def test_the_numbers_are_those_of_the_models(name):
    """The rows that begin with a model's name have its parameters and its MACs."""
    with torch.device("meta"):
        model = getattr(scalablevit, f"scalablevit_{name.lower()}")()
    cost = scalablevit.count_macs(model, (224, 224))
    row = "".join(re.findall(rf"^\| {name} \|.*", README, re.MULTILINE))
    assert f"| {sum(p.numel() for p in model.parameters()):,} |" in row
    assert f"| {cost['modules'] / 1e9:.3f} G |" in row
    assert f"| {sum(cost.values()) / 1e9:.3f} G |" in row


def headings(page):
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            file, _, place = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not place or place in headings(linked), target
