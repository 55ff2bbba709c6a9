"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import flash_semicrf
import sklearn_api

OPTIONAL = {"triton"}
"""Dependencies that some modules cannot be imported without."""


def module_names() -> list[str]:
    """Every module of both packages."""
    packages = (flash_semicrf, sklearn_api)
    walks = (pkgutil.walk_packages(p.__path__, p.__name__ + ".") for p in packages)
    return sorted(info.name for walk in walks for info in walk)


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that saves a file leaves nothing in the tree
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0
