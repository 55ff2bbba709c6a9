"""Kernels by Triton's compiler: some without one of its passes, and several at a time.

The pass that is left out, `TritonGPUCoalesce`, gives the axis along which memory is contiguous to
neighbouring threads. For every load and store it visits all operations that depend on each other
with it: in the unrolled blocks of the passes over time that was three quarters of the time of
compilation. Triton gives neighbouring threads the last axis to begin with, so where tiles have
labels there, the pass changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from flash_semicrf.streaming.compilation import compiling

__all__ = ["compile_kernel", "compile_kernels", "labels_last"]

_Kernel = TypeVar("_Kernel", bound=Callable)

_this_thread = threading.local()


def labels_last(kernel: _Kernel) -> _Kernel:
    """Mark a kernel all of whose tiles have labels along the last axis."""
    kernel.labels_last = True
    return kernel


@functools.cache
def _make_optional() -> None:
    """Let a thread leave the pass out of what it compiles.

    Triton has no option for it. Its compiler adds the passes one by one, by functions of `passes`;
    in a version that has no such function kernels are compiled with all passes.
    """
    from triton._C.libtriton import passes

    add = getattr(passes.ttgpuir, "add_coalesce", None)
    if add is None:
        return

    @functools.wraps(add)
    def add_unless_left_out(*arguments: object) -> None:
        if not getattr(_this_thread, "leaves_out", False):
            add(*arguments)

    passes.ttgpuir.add_coalesce = add_unless_left_out


@contextlib.contextmanager
def _without_coalescing() -> Iterator[None]:
    _make_optional()
    _this_thread.leaves_out = True
    try:
        yield
    finally:
        _this_thread.leaves_out = False


def compile_kernel(source: ASTSource, num_warps: int, target: GPUTarget) -> CompiledKernel:
    """Compile a kernel, or take it from Triton's cache on disk.

    Parameters
    ----------
    source : ASTSource
        A kernel with the types of its parameters and the values of those that are constants.
    num_warps : int
        Warps of a program.
    target : GPUTarget
    """
    quick = getattr(source.fn, "labels_last", False)
    with _without_coalescing() if quick else contextlib.nullcontext():
        return triton.compile(source, target=target, options={"num_warps": num_warps})


@functools.cache
def _hash_triton() -> None:
    """Let Triton hash its own files, part of the keys of its cache, before threads all do."""
    from triton.runtime import cache

    getattr(cache, "triton_key", lambda: None)()


def compile_kernels(
    sources: Sequence[tuple[ASTSource, int]], target: GPUTarget | None = None
) -> list[CompiledKernel]:
    """Compile kernels, as many at a time as torch has threads.

    Parameters
    ----------
    sources : sequence of (ASTSource, int)
        As `compile_kernel` takes them.
    target : GPUTarget, optional
        By default that of the current device, on which the kernels are loaded too.
    """
    # Asked here, because each thread has a current device of its own.
    device = torch.cuda.current_device() if target is None else None
    if target is None:
        target = triton.runtime.driver.active.get_current_target()

    def compile_one(source: ASTSource, num_warps: int) -> CompiledKernel:
        with compiling(f"{source.fn.__module__}.{source.fn.__name__}", "GPU"):
            compiled = compile_kernel(source, num_warps, target)
            if device is not None:
                with torch.cuda.device(device):
                    _ = compiled.run  # which also compiles, in C, what launches the kernel
        return compiled

    threads = min(len(sources), torch.get_num_threads())
    _hash_triton()
    if threads < 2:
        return [compile_one(*each) for each in sources]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="flash_semicrf-compiler")
    try:
        running = [pool.submit(compile_one, *each) for each in sources]
        return [future.result() for future in running]
    finally:
        pool.shutdown(cancel_futures=True)
