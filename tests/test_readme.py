"""Every code block of the README: Python is run, and command lines are held against the programs they call."""
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

import scalablevit

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)                                # for docs/
    exec(compile(code, "README.md", "exec"), {})


def command_lines():
    for language, code in BLOCKS:
        if language == "bash":
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                program = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if program is not None:
                    yield words[program], {word for word in words[program:] if word.startswith("--")}


@pytest.mark.parametrize("program", ["train_minimal.py", "scalablevit.py", "docs/ablation.py", "docs/figures.py"])
def test_flags_of_the_command_lines_exist(program):
    if program == "docs/figures.py":
        pytest.importorskip("matplotlib")
    known = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
    known = set(re.findall(r"--[a-z0-9-]+", known))
    used = set().union(*(flags for name, flags in command_lines() if name == program))
    assert used <= known


def test_every_block_is_python_or_a_command():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert (ROOT / "scalablevit.py").exists() and all((ROOT / name).exists() for name, _ in command_lines())


# ------------------------------------------------------------------------------------------------ what it says
def test_the_table_of_classes_leads_to_their_lines():
    """A class that has moved: the message has the line it is on now."""
    source = (ROOT / "scalablevit.py").read_text().splitlines()
    rows = re.findall(r"^\|[^|]+\| (`\w+`(?:, `\w+`)*) \| (\[\d+\].*) \|$", README, re.MULTILINE)
    shown = {name: line for names, lines in rows
             for name, line in zip(re.findall(r"\w+", names), re.findall(r"\[(\d+)\]\(scalablevit\.py#L\1\)", lines),
                                   strict=True)}
    where = {match[1]: str(n) for n, line in enumerate(source, 1) if (match := re.match(r"(?:class|def) (\w+)\b", line))}
    assert shown == {name: where.get(name) for name in shown}
    assert set(shown) >= {name for name in where if name[0].isupper()} - {"DropPath", "Mlp"}    # details of a block


@pytest.mark.parametrize("name", ["tiny", "s", "b", "l"])
def test_the_numbers_are_those_of_the_models(name):
    with torch.device("meta"):
        model = getattr(scalablevit, f"scalablevit_{name}")()
    cost = scalablevit.count_macs(model, (224, 224))
    row = (f"| {name if name == 'tiny' else name.upper()} | {sum(p.numel() for p in model.parameters()):,} | "
           f"{cost['modules'] / 1e9:.3f} G | {sum(cost.values()) / 1e9:.3f} G |")
    assert row in README


def test_the_numbers_around_the_backbone_are_those_that_are_printed(capsys):
    import test_dense
    test_dense.main()
    assert all(line in README for line in capsys.readouterr().out.splitlines())


def test_links_lead_somewhere():
    """To files that are here, and to headings of the README itself."""
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            file, _, place = target.partition("#")
            assert (ROOT / file).exists() and (file or place in headings), target
