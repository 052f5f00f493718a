"""Every document is executed: Python blocks run, links lead somewhere, generated pages are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```(?:\n+```text\n(.*?)^```)?", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if PYTHON.search(p.read_text())], ids=name_of)
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path):
    """The blocks of a page run as one script in an empty folder; a text block right after one is its exact output."""
    blocks = PYTHON.findall(page.read_text())
    script = "\nprint('\\f', end='')\n".join(code for code, _ in blocks)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    for (code, expected), printed in zip(blocks, done.stdout.split("\f"), strict=True):
        if expected:
            assert printed == expected, f"the block beginning {code.splitlines()[0]!r} prints something else"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_names_this_machine():
    """No absolute path of a developer's machine in anything that ships."""
    home = str(ROOT.parent) + os.sep
    for path in [*PAGES, *(ROOT / "docs").rglob("*.json"), *(ROOT / "src").rglob("*.py"), *(ROOT / "tools").rglob("*")]:
        if path.is_file():
            text = path.read_text(errors="ignore")
            assert home not in text, name_of(path)
            if path.suffix == ".json":
                assert not re.search(r"(?<![\w.])/(tmp|home|root|Users|work)/", text), name_of(path)
