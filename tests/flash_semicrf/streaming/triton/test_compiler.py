"""Kernels compiled with and without the pass that spreads loads anew, one by one and together."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf.streaming.triton.backend import HAS_TRITON

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError

    from flash_semicrf.streaming.compilation import watched
    from flash_semicrf.streaming.triton.compiler import (
        compile_kernel,
        compile_kernels,
        labels_last,
    )

    def _copy(x_ptr, y_ptr):
        # Memory is contiguous along the first axis.
        place = tl.arange(0, 32)[:, None] + 32 * tl.arange(0, 32)[None, :]
        tl.store(y_ptr + place, tl.load(x_ptr + place) + 1.0)

    def _twice(x_ptr, y_ptr):
        place = tl.arange(0, 32)[:, None] + 32 * tl.arange(0, 32)[None, :]
        tl.store(y_ptr + place, tl.load(x_ptr + place) * 2.0)

    ORDINARY, MARKED = triton.jit(_copy), labels_last(triton.jit(_copy))
    TWICE = triton.jit(_twice)
    TARGET = GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def code_of(compiled) -> str:
    lines = compiled.asm["ttgir"].splitlines()
    return "\n".join(line for line in lines if line.startswith("#blocked"))


def source_of(kernel):
    return ASTSource(kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"})


def test_the_pass_is_left_out_for_marked_kernels_alone(tmp_path, monkeypatch):
    layouts = {}
    # Marked or not, the source is the same to Triton's cache.
    for name, kernel in (("marked", MARKED), ("ordinary", ORDINARY)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
        layouts[name] = code_of(compile_kernel(source_of(kernel), 4, TARGET))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    own = triton.compile(source_of(ORDINARY), target=TARGET, options={"num_warps": 4})
    assert "order = [0, 1]" in layouts["ordinary"] == code_of(own)
    assert "order = [0, 1]" not in layouts["marked"]


def test_kernels_compiled_together_are_those_compiled_one_by_one(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    sources = [(source_of(kernel), warps) for kernel in (MARKED, TWICE) for warps in (1, 4)]
    found, costs = {}, []
    try:
        for n in (1, 4):
            monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / str(n)))
            torch.set_num_threads(n)
            with watched(costs.append):
                found[n] = compile_kernels(sources, TARGET)
    finally:
        torch.set_num_threads(threads)
    assert [x.asm["ptx"] for x in found[1]] == [x.asm["ptx"] for x in found[4]]
    assert [x.metadata.num_warps for x in found[4]] == [1, 4, 1, 4]
    assert ["order = [0, 1]" in code_of(x) for x in found[4]] == [False, False, True, True]
    names = [cost.kernel.rpartition(".")[2] for cost in costs]
    assert sorted(names) == ["_copy"] * 4 + ["_twice"] * 4


def test_an_error_of_the_compiler_is_raised():
    broken = ASTSource(MARKED, {"x_ptr": "i32", "y_ptr": "*fp32"})
    with pytest.raises(CompilationError, match="Unsupported ptr type"):
        compile_kernels([(source_of(MARKED), 4), (broken, 4)], TARGET)
