"""Launches of compiled kernels, by the function in C that Triton compiles for them where possible.

Triton's own way there makes a function for the grid, asks for the device, builds a record for
profilers whether or not there is one, and looks for memory that a kernel may ask for: some ten
microseconds of Python. All but the arguments and the stream are the same in every launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ["Launcher", "launcher_of"]

_FORM = "iiiKKppOOOOOO"
"""Of the arguments before the kernel's own, as functions of Triton 3.6 parse them: the grid, the
stream, and what `_direct` puts together."""


class Launcher(NamedTuple):
    """What launches a compiled kernel.

    Attributes
    ----------
    compiled : CompiledKernel
    run : callable or None
        The function in C; None where it is not known how to call it.
    fixed : tuple
        Its arguments between the stream and those of the kernel.
    """

    compiled: CompiledKernel
    run: Callable[..., None] | None
    fixed: tuple

    def __call__(self, device: int, grid: tuple[int, ...], arguments: tuple) -> None:
        """Launch on the current stream of `device`, which is the current one.

        `arguments` are all of the kernel's, constants too; `grid` has three entries.
        """
        stream = driver.active.get_current_stream(device)
        if self.run is None or _has_hooks():
            self.compiled[grid](*arguments, stream=stream)
        else:
            self.run(*grid, stream, *self.fixed, *arguments)


def launcher_of(compiled: CompiledKernel) -> Launcher:
    """Launcher of a kernel, which is loaded on the current device."""
    launcher = compiled.run  # loads it
    if not _is_direct(type(launcher)):
        return Launcher(compiled, None, ())
    if launcher.global_scratch_size > 0 or launcher.profile_scratch_size > 0:
        return Launcher(compiled, None, ())
    options = launcher.launch_cooperative_grid, launcher.launch_pdl
    nothing = None, None  # of memory for the kernel
    unwatched = None, None, None  # the record for hooks, and the hooks
    fixed = (compiled.function, *options, *nothing, compiled.packed_metadata, *unwatched)
    return Launcher(compiled, launcher.launch, fixed)


@functools.cache
def _is_direct(kind: type) -> bool:
    """Whether launchers of a class are those of Triton for CUDA, with functions of known form."""
    try:
        from triton.backends.nvidia import driver as cuda
    except ImportError:
        return False
    return kind is cuda.CudaLauncher and getattr(cuda, "_BASE_ARGS_FORMAT", None) == _FORM


def _has_hooks() -> bool:
    """Whether somebody watches launches, a profiler for instance."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
