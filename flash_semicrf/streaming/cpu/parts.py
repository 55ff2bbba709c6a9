"""How the functions that kernels are made of are compiled: lowered each, optimised once.

Numba optimises every compiled function by itself, makes machine code of it and wraps it for calls
from Python, and does the first two again in each of its callers: most of the time of a compilation
goes into code that nobody runs. Here a function that only compiled functions call is a *part*: it
is lowered to LLVM's language and no more. A *whole*, which Python calls, takes all parts below it
into one module, which is optimised and turned into machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import binding as llvm
from numba import _dynfunc, njit, types
from numba.core import errors
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering

from flash_semicrf.streaming.compilation import compiling

__all__ = ["OPTIONS", "helper", "inlined", "inlined_owning", "owning", "whole"]

OPTIONS = {
    "nogil": True,
    "fastmath": {"contract"},
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
"""Of every compiled function."""


class _Library(JITCodeLibrary):
    """Code that is optimised only with all that it calls."""

    def _optimize_functions(self, ll_module: llvm.ModuleRef) -> None:
        """Numba would optimise each function by itself, before it is linked."""


class _PartLibrary(_Library):
    """Code of a part: the libraries below it are linked with it into a whole."""

    def finalize(self) -> None:
        self._raise_if_finalized()
        self._finalize_dynamic_globals()
        self._finalized = True


class _WholeLibrary(_Library):
    """Code of a whole."""

    has_scalar_loops = False

    def finalize(self) -> None:
        self._linking_libraries = list(_below(self._linking_libraries, set()))
        super().finalize()

    def _optimize_final_module(self) -> None:
        codegen, module = self._codegen, self._final_module
        # What must be inlined is so first, and counts of references that cancel are taken out.
        options = llvm.create_pipeline_tuning_options(0)
        builder = llvm.create_pass_builder(codegen._tm, options)
        manager = llvm.create_new_module_pass_manager()
        manager.add_always_inliner_pass()
        manager.add_sroa_pass()
        manager.add_simplify_cfg_pass()
        manager.add_refprune_pass()
        manager.run(module, builder)
        # Where vectors are explicit, unrolling the loops around them would double the code.
        options = llvm.create_pipeline_tuning_options(3 if self.has_scalar_loops else 2)
        options.slp_vectorization = False
        options.loop_vectorization = options.loop_interleaving = self.has_scalar_loops
        options.loop_unrolling = self.has_scalar_loops
        builder = llvm.create_pass_builder(codegen._tm, options)
        manager = builder.getModulePassManager()
        manager.add_refprune_pass()
        manager.run(module, builder)


def _below(libraries: list[JITCodeLibrary], seen: set[JITCodeLibrary]) -> Iterator[JITCodeLibrary]:
    """Libraries and those that the parts among them call, each once."""
    for library in libraries:
        if library not in seen:
            seen.add(library)
            yield library
            if isinstance(library, _PartLibrary):
                yield from _below(library._linking_libraries, seen)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):
    _name = "flash_semicrf_lower_part"

    def run_pass(self, state: Any) -> bool:
        context = state.targetctx
        state.library = _PartLibrary(context.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        if not state.flags.nrt:
            self._require_no_arrays(state)
        super().run_pass(state)
        lowered = state["cr"]
        # Numba finds a compiled function's code by what Python would call, which nobody does.
        entry = _dynfunc.make_function(
            lowered.fndesc.lookup_module(),
            lowered.fndesc.qualname.rpartition(".")[2],
            "part of a kernel; not to be called from Python",
            0,
            lowered.env,
            (state.library,),
        )
        context.insert_user_function(entry, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=entry)
        return True

    @staticmethod
    def _require_no_arrays(state: Any) -> None:
        """Arrays that are returned need counts of references, here or by a part that is called."""
        model = state.targetctx.data_model_manager
        returned = [state.return_type]
        for expression, signature in state.calltypes.items():
            if getattr(expression, "op", None) == "call":
                called = state.typemap[expression.func.name]
                if isinstance(called, types.Dispatcher):
                    returned.append(signature.return_type)
        if any(model[kind].contains_nrt_meminfo() for kind in returned):
            name = state.func_id.func_qualname
            raise errors.CompilerError(f"{name} returns arrays or takes some: make it `owning`")


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerWhole(NativeLowering):
    _name = "flash_semicrf_lower_whole"
    library = _WholeLibrary

    def run_pass(self, state: Any) -> bool:
        state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


class _LoopLibrary(_WholeLibrary):
    has_scalar_loops = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerLoops(_LowerWhole):
    _name = "flash_semicrf_lower_loops"
    library = _LoopLibrary


class _Pipeline(CompilerBase):
    """Numba's own, with another pass for the lowering."""

    lowering: type[NativeLowering]

    def define_pipelines(self) -> list:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (self.lowering if which is NativeLowering else which, description)
            for which, description in manager.passes
        ]
        manager.finalize()
        return [manager]


class _Part(_Pipeline):
    lowering = _LowerPart


class _Whole(_Pipeline):
    lowering = _LowerWhole

    def compile_extra(self, func: Callable) -> Any:
        with compiling(func.__qualname__, "CPU"):
            return super().compile_extra(func)


class _Loops(_Whole):
    lowering = _LowerLoops


def helper(function: Callable, **options: Any) -> Callable:
    """Compile a function that only compiled functions call: it is cached as part of them.

    It borrows the arrays that it is given, counts no references to them, and can neither allocate
    nor return arrays.
    """
    given = {**OPTIONS, "no_cpython_wrapper": True, "_nrt": False, **options}
    return njit(pipeline_class=_Part, **given)(function)


def owning(function: Callable, **options: Any) -> Callable:
    """Compile a part that allocates arrays or returns them."""
    return helper(function, _nrt=True, **options)


def inlined(function: Callable, **options: Any) -> Callable:
    """Compile a part of a kernel that is called for every position.

    A call passes every array of a NamedTuple by value, some forty words each: more than the work
    of a short loop over labels. These are always inlined.
    """
    return helper(function, forceinline=True, **options)


def inlined_owning(function: Callable) -> Callable:
    """Compile an inlined part that allocates arrays or returns them."""
    return inlined(function, _nrt=True)


def whole(function: Callable, scalar_loops: bool = False) -> Callable:
    """Compile a function that Python calls.

    With `scalar_loops` LLVM makes vectors of loops and unrolls them, which takes longer.
    """
    return njit(pipeline_class=_Loops if scalar_loops else _Whole, **OPTIONS)(function)
