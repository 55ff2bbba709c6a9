"""Size and shape of the code base: ``python -m benchmarks.house [ROOT ...]``.

Prints the rows of the table in ``docs/architecture.md``, one column per working tree (the current
one by default). ``--trace`` prints, instead, the files that each traced call enters, each with the
file of its first caller.

Modules, functions and imports are read from the source. The calls run in fresh processes with the
packages of the given tree: see `benchmarks.children.entered`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("flash_semicrf", "sklearn_api")
CALLS = ("fit", "predict", "log_partition")
MOST_ARGUMENTS = 10


def modules(root: Path) -> dict[str, Path]:
    """Paths of all modules of the packages, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def long_signatures(found: dict[str, Path]) -> list[tuple[str, str, int]]:
    """(module, function, arguments) of each function above `MOST_ARGUMENTS`.

    Functions that Triton compiles do not count.
    """
    long = []
    for name, path in found.items():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            compiled = ".triton." in name and node.decorator_list
            if count > MOST_ARGUMENTS and not compiled:
                long.append((name, node.name, count))
    return long


def imports(name: str, found: dict[str, Path]) -> set[tuple[str, str]]:
    """(module, name) of all that a module imports from these packages.

    The name is empty where a whole module is imported. `TYPE_CHECKING` blocks are left out.
    """
    is_package = found[name].name == "__init__.py"
    taken: set[tuple[str, str]] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            taken.update((alias.name, "") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
            origin = (
                ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            )
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                taken.add((whole, "") if whole in found else (origin, alias.name))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parse(found[name]))
    return {(module, taken_name) for module, taken_name in taken if module in found}


def room(name: str) -> str:
    """Top-level module or sub-package that a module is in: `flash_semicrf.inference`, ..."""
    return ".".join(name.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes of a graph each of which reaches the others of its group."""
    reached = {name: set(reachable(graph, name)) for name in graph}
    groups: list[set[str]] = []
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]}
        if group and group not in groups:
            groups.append(group)
    return groups


def graphs(found: dict[str, Path]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Imports between modules, and between rooms."""
    between_modules = {name: {m for m, _ in imports(name, found)} - {name} for name in found}
    between_rooms: dict[str, set[str]] = {room(name): set() for name in found}
    for name, taken in between_modules.items():
        between_rooms[room(name)] |= {room(other) for other in taken} - {room(name)}
    return between_modules, between_rooms


def reachable(graph: dict[str, set[str]], start: str) -> Iterator[str]:
    """Nodes of a graph that at least one edge leads to from another."""
    done: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in done:
            done.add(name)
            yield name
            waiting.extend(graph[name])


def entered(root: Path, call: str) -> dict[str, str]:
    """Files of a tree's packages that a warm call enters, in order, and those of first callers."""
    child = HERE / "benchmarks" / "children" / "entered.py"
    finished = subprocess.run(
        [sys.executable, str(child), call, str(root)],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"{call} failed in {root}:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def describe(root: Path) -> dict[str, str]:
    """Column of the table for one tree."""
    found = modules(root)
    streaming = [path for name, path in found.items() if ".streaming" in name]
    between_modules, between_rooms = graphs(found)
    underscored = [
        (name, taken)
        for name in found
        for _, taken in imports(name, found)
        if taken.startswith("_") and taken != "__version__"
    ]
    public = [name for name in found if name.count(".") == 1 and "._" not in name]
    return {
        "files": f"{len(found):,}",
        "lines": f"{count_lines(list(found.values())):,}",
        "lines of `flash_semicrf/streaming`": f"{count_lines(streaming):,}",
        "public modules and packages at the top": str(len(public)),
        f"functions of more than {MOST_ARGUMENTS} arguments": str(len(long_signatures(found))),
        "modules in import circles": str(sum(map(len, circles(between_modules)))),
        "rooms in import circles": str(sum(map(len, circles(between_rooms)))),
        "underscored names imported from another module": str(len(underscored)),
        **{f"files entered by `{call}`": str(len(entered(root, call))) for call in CALLS},
    }


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table, or the traced files."""
    parser = argparse.ArgumentParser(description="Size and shape of the code base.")
    parser.add_argument("roots", nargs="*", type=Path, default=[HERE], metavar="ROOT")
    parser.add_argument("--trace", action="store_true", help="print the files that calls enter")
    options = parser.parse_args(argv)
    roots = [root.resolve() for root in options.roots]
    if options.trace:
        for root in roots:
            for call in CALLS:
                print(f"\n{call}, {root}")
                for name, caller in entered(root, call).items():
                    print(f"    {name}" + (f"  (from {caller})" if caller else ""))
        return
    columns = [describe(root) for root in roots]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
