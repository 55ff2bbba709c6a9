"""The Python blocks of README.md and docs/**/*.md run as written; links and paths lead somewhere.

The blocks of one file share one namespace, in order. A block fenced as ```` ```python no-run ````
is left out.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python[ \t]*(?P<flags>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.M | re.S)


LINK = re.compile(r"\]\((?!https?:)(?P<page>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
FILE = re.compile(r"(?<![\w/~.])(?:\w[\w-]*/)+[\w-]+\.(?:py|md|csv|json)\b")
FOLDER = re.compile(r"(?:[a-z]\w*/)+")
NAME = re.compile(r"(?<![\w/.])(?:flash_semicrf|sklearn_api)(?:\.\w+)+\b(?!/)")
# Paths in these pages may start here instead of at the root.
STARTS = [ROOT, ROOT / "flash_semicrf" / "streaming"]


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


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_links_lead_somewhere(page):
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / match["page"] if match["page"] else page
        assert target.exists(), match[0]
        if match["anchor"]:
            assert match["anchor"] in anchors(target.read_text(encoding="utf-8")), match[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_names_files_and_modules_that_exist(page):
    text = page.read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)  # paths of calls
    named = {path for part in quoted + blocks for path in FILE.findall(part)}
    named |= {part for part in quoted if FOLDER.fullmatch(part)}
    missing = {path for path in named if not any((start / path).exists() for start in STARTS)}
    assert not missing
    assert not {name for part in quoted for name in NAME.findall(part) if not resolves(name)}
