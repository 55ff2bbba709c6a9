"""Both packages are typed: they tell type checkers so, and public callables have annotations."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest

MODULES = [
    "flash_semicrf",
    "flash_semicrf.compat",
    "flash_semicrf.duration",
    "flash_semicrf.exact.edges",
    "flash_semicrf.exact.semimarkov",
    "flash_semicrf.inference.autograd",
    "flash_semicrf.inference.distribution",
    "flash_semicrf.inference.expectations",
    "flash_semicrf.inference.information",
    "flash_semicrf.inference.log_partition",
    "flash_semicrf.inference.marginals",
    "flash_semicrf.inference.minimum_risk",
    "flash_semicrf.inference.nbest",
    "flash_semicrf.inference.partial",
    "flash_semicrf.inference.posterior",
    "flash_semicrf.inference.sampling",
    "flash_semicrf.inference.viterbi",
    "flash_semicrf.nn",
    "flash_semicrf.problem.arguments",
    "flash_semicrf.problem.constraints",
    "flash_semicrf.problem.potentials",
    "flash_semicrf.problem.segments",
    "flash_semicrf.problem.unroll",
    "flash_semicrf.problem.validation",
    "flash_semicrf.semirings",
    "flash_semicrf.semirings.checkpoint",
    "flash_semicrf.sparse",
    "flash_semicrf.streaming.assembly",
    "flash_semicrf.streaming.dispatch",
    "flash_semicrf.streaming.reference",
    "flash_semicrf.streaming.streams",
    "flash_semicrf.testing",
    "sklearn_api",
    "sklearn_api.datasets",
    "sklearn_api.display",
    "sklearn_api.encoders",
    "sklearn_api.metrics",
    "sklearn_api.model_selection",
    "sklearn_api.preprocessing",
    "sklearn_api.segmenter",
]
"""Modules whose `__all__` is public, or of use to whoever extends the library."""

PACKAGES = ("flash_semicrf", "sklearn_api")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_a_typed_marker(package):
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_public_callables_have_annotations(module):
    names = importlib.import_module(module).__all__
    found = [getattr(importlib.import_module(module), name) for name in names]
    missing = {
        f"{where}: {name}"
        for value in found
        if callable(value) and value.__module__.startswith(PACKAGES)
        for where, function in functions(value)
        for name in unannotated(function)
    }
    assert not missing


def functions(value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function by its name, or the public methods and properties that a class defines."""
    if not inspect.isclass(value):
        yield getattr(value, "__name__", repr(value)), value
        return
    for name, member in vars(value).items():
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        public = not name.startswith("_") or name == "__init__"
        # A protocol's constructor is typing's.
        if public and inspect.isfunction(member) and member.__module__.startswith(PACKAGES):
            yield f"{value.__qualname__}.{name}", member


def unannotated(function: Callable[..., Any]) -> list[str]:
    """Parameters, and "return", that lack an annotation."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    missing = [p.name for p in parameters if p.annotation is p.empty]
    return missing + (["return"] if signature.return_annotation is signature.empty else [])
