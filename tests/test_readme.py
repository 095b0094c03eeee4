"""Every code block of the README: Python is run, and command lines are held against the programs they call."""
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def command_lines():
    for language, code in BLOCKS:
        if language == "bash":
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                program = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if program is not None:
                    yield words[program], {word for word in words[program:] if word.startswith("--")}


@pytest.mark.parametrize("program", ["train_minimal.py", "scalablevit.py"])
def test_flags_of_the_command_lines_exist(program):
    known = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"--[a-z0-9-]+", known))
    used = set().union(*(flags for name, flags in command_lines() if name == program))
    assert used <= known


def test_every_block_is_python_or_a_command():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert (ROOT / "scalablevit.py").exists() and all((ROOT / name).exists() for name, _ in command_lines())
