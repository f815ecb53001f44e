"""The README's quick start runs, and the names in its table are there."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import fixup_init as fi

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_quick_start() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 15
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "L = 50" in run.stdout


def test_names_in_the_table_exist() -> None:
    names = set(re.findall(r"`fi\.([A-Za-z_.]+)", README))
    assert {"structure", "plan", "init", "analyze", "compare"} <= names
    for name in names:
        found = fi
        for part in name.split("."):
            found = getattr(found, part)
        assert found is not None


def test_the_two_commands() -> None:
    commands = re.findall(r"^python -m pip install .*&& .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("fixup-init demo") and commands[1].endswith("python -m pytest")
