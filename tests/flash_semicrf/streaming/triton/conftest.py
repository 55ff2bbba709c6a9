"""Triton's interpreter, for the tests that run in it."""

from __future__ import annotations

import types

import numpy as np
import pytest


@pytest.fixture(scope="module")
def interpreter():
    """Repair what the interpreter lacks, and hide its warnings of values that are discarded."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_language_once(fn):
        # Not again for each function that a kernel calls: that took a quarter of the time.
        if tl.core.is_builtin(tl.core.load):
            return patch_language(both)
        return interpreter._LangPatchScope()

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        # numpy >= 2.4 turns arrays of no dimensions only into an int; loop bounds have one.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_language_once)
        # Both branches of tl.where are computed: numpy warns of logs of zero and of overflow in
        # the one that is not taken.
        with np.errstate(all="ignore"):
            yield
