"""The Python blocks of README.md and docs/**/*.md run as written.

The blocks of one file share one namespace, in order. A block fenced as ```` ```python no-run ````
is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python[ \t]*(?P<flags>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.M | re.S)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return (line of the first statement, code) of each block that is to be run."""
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in FENCE.finditer(text)
        if "no-run" not in match["flags"].split()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_blocks_run(page, tmp_path, monkeypatch):
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)  # a block that saves a file leaves nothing in the tree
    namespace = {"__name__": "__docs__"}
    for line, code in blocks:
        # Leading newlines make tracebacks name the line of the page.
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_blocks_found_and_no_run_skipped():
    text = "a\n```python\nx = 1\n```\n```python no-run\n1 / 0\n```\n```bash\nls\n```\n"
    assert python_blocks(text) == [(2, "x = 1\n")]


def test_readme_opens_with_the_two_commands_and_has_examples():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("```python")
    assert len(python_blocks(text)) >= 2
