"""Torch's own OpenMP threads, entered from compiled kernels.

After a parallel operation torch's threads keep a core each busy for some milliseconds, waiting for
the next one. A pool beside them competes for these cores, so the kernels run on them instead: by
``GOMP_parallel`` (libgomp, and libomp on macOS) or ``__kmpc_fork_call`` (libomp on Windows) of the
very library that torch uses. The addresses are arguments of the kernels: a cached kernel also loads
where there is no such library.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.parts import helper

__all__ = [
    "NO_TEAM",
    "Team",
    "find_team",
    "run_on_team",
    "team_of",
    "thread_seconds",
    "wall_seconds",
]

_GOMP, _KMPC = 1, 2

_LOCATION = (ctypes.c_int32 * 4)(0, 2, 0, 0)  # flags: compiled for this interface
_SOURCE = ctypes.create_string_buffer(b";unknown;unknown;0;0;;")


class _Ident(ctypes.Structure):
    """``ident_t`` of LLVM's OpenMP runtime."""

    _fields_ = (("fields", ctypes.c_int32 * 4), ("source", ctypes.c_char_p))


_IDENT = _Ident(_LOCATION, ctypes.cast(_SOURCE, ctypes.c_char_p))


class Team(NamedTuple):
    """Location of the OpenMP runtime.

    Attributes
    ----------
    entry : int
        How threads are started: by ``GOMP_parallel``, by ``__kmpc_fork_call``, or 0: not at all.
    fork : int
        Address of that function.
    location : int
        Its first argument, of ``__kmpc_fork_call``.
    thread : int
        Address of ``omp_get_thread_num``.
    clock : int
        Address of ``omp_get_wtime``.
    thread_clock : int
        Address of ``clock_gettime``; 0 where there is none, as on Windows.
    """

    entry: int
    fork: int
    location: int
    thread: int
    clock: int
    thread_clock: int


NO_TEAM = Team(0, 0, 0, 0, 0, 0)


def find_team() -> Team:
    """Addresses in the OpenMP runtime that torch uses; `NO_TEAM` where it uses none."""
    if "OpenMP" not in torch.__config__.parallel_info().partition("ATen parallel backend")[2]:
        return NO_TEAM
    for library in _libraries():
        team = team_of(library)
        if team.entry:
            return team
    return NO_TEAM


def _libraries() -> list[ctypes.CDLL]:
    """The library of torch's operations, whose symbols include those of what it depends on."""
    folder = Path(torch.__file__).parent / "lib"
    # Windows looks in one library alone, in the one that is loaded already.
    names = {"win32": ("libiomp5md.dll",), "darwin": ("libtorch_cpu.dylib",)}
    found = []
    for name in names.get(sys.platform, ("libtorch_cpu.so",)):
        path = folder / name
        try:
            found.append(ctypes.CDLL(str(path) if path.exists() else name))
        except OSError:
            continue
    return found


def team_of(library: ctypes.CDLL, prefer_kmpc: bool = False) -> Team:
    """The addresses in a library, which may offer both ways to start threads."""
    thread, clock = _address(library, "omp_get_thread_num"), _address(library, "omp_get_wtime")
    if not (thread and clock):
        return NO_TEAM
    clocks = (thread, clock, _thread_clock())
    gomp, kmpc = _address(library, "GOMP_parallel"), _address(library, "__kmpc_fork_call")
    if gomp and not (kmpc and prefer_kmpc):
        return Team(_GOMP, gomp, 0, *clocks)
    if kmpc:
        return Team(_KMPC, kmpc, ctypes.addressof(_IDENT), *clocks)
    return NO_TEAM


def _address(library: ctypes.CDLL, name: str) -> int:
    """Address of a symbol, 0 where there is none."""
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def _thread_clock() -> int:
    """Address of ``clock_gettime`` where it has a clock for each thread."""
    has_one = hasattr(time, "CLOCK_THREAD_CPUTIME_ID") and sys.maxsize > 2**32
    return _address(ctypes.CDLL(None), "clock_gettime") if has_one else 0


_BYTES = ir.IntType(8).as_pointer()
_INT = llvm.I32


def _call(builder, address, returned, arguments, variadic=False):
    """Call a C function by its address."""
    types_of = [value.type for value in arguments]
    function = ir.FunctionType(returned, types_of[:3] if variadic else types_of, var_arg=variadic)
    return builder.call(builder.inttoptr(address, function.as_pointer()), arguments)


@llvm.routine(types.float64)
def _omp_get_wtime(builder, address):
    return _call(builder, address, llvm.F64, [])


@llvm.routine(types.float64)
def _clock_gettime(builder, address):
    """Processor time of the calling thread, in seconds."""
    which = getattr(time, "CLOCK_THREAD_CPUTIME_ID", 0)
    timespec = cgutils.alloca_once(builder, ir.ArrayType(llvm.I64, 2))
    _call(builder, address, _INT, [_INT(which), timespec])
    places = (cgutils.gep_inbounds(builder, timespec, 0, i) for i in range(2))
    whole, rest = (builder.sitofp(builder.load(place), llvm.F64) for place in places)
    return builder.fadd(whole, builder.fmul(rest, llvm.F64(1e-9)))


@helper
def wall_seconds(team):
    """Seconds by the clock of the team's runtime; 0 without a team."""
    return _omp_get_wtime(team.clock) if team.clock != 0 else 0.0


@helper
def thread_seconds(team):
    """Processor time of the calling thread, or the time of day where that is not known."""
    return _clock_gettime(team.thread_clock) if team.thread_clock != 0 else wall_seconds(team)


@intrinsic
def run_on_team(typing_context, team, num_threads, worker, arguments):
    """Call ``worker(thread, *arguments)`` on every thread of a team; return whether any failed.

    Parameters
    ----------
    team : Team
        With `NO_TEAM` the one call is in this thread.
    num_threads : int
    worker : compiled function
        It returns nothing.
    arguments : tuple
    """
    given = (types.int64, *arguments)
    called = worker.get_call_type(typing_context, given, {})

    def generate(context, builder, signature, values):
        compiled = worker.dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(compiled.library)
        module = builder.module
        callee = context.declare_function(module, compiled.fndesc)
        # Passed to a thread: where `omp_get_thread_num` is, the arguments, a place for failure.
        given_type = context.get_value_type(signature.args[3])
        shared = ir.LiteralStructType([llvm.I64, given_type, _INT])

        def body(prefix: list, name: str) -> ir.Function:
            """A C function that takes `prefix`, which it ignores, and the address of `shared`."""
            form = ir.FunctionType(ir.VoidType(), [*prefix, _BYTES])
            function = ir.Function(module, form, name=module.get_unique_name(name))
            function.linkage = "internal"
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            data = inner.bitcast(function.args[-1], shared.as_pointer())
            which, packed, failed = (cgutils.gep_inbounds(inner, data, 0, i) for i in range(3))
            address = inner.load(which)
            number = cgutils.alloca_once_value(inner, llvm.I64(0))
            with inner.if_then(cgutils.is_not_null(inner, address)):
                thread = _call(inner, address, _INT, [])
                inner.store(inner.sext(thread, llvm.I64), number)
            unpacked = cgutils.unpack_tuple(inner, inner.load(packed), len(arguments))
            status, _ = context.call_conv.call_function(
                inner, callee, called.return_type, called.args, [inner.load(number), *unpacked]
            )
            with cgutils.if_unlikely(inner, status.is_error):
                inner.store(_INT(1), failed)
            inner.ret_void()
            return function

        plain = body([], "team_body")
        with_ids = body([_INT.as_pointer()] * 2, "team_body_with_ids")
        addresses = cgutils.unpack_tuple(builder, values[0], len(Team._fields))
        entry, fork, location, thread = addresses[:4]
        data = cgutils.alloca_once(builder, shared)
        for i, value in enumerate((thread, values[3], _INT(0))):
            builder.store(value, cgutils.gep_inbounds(builder, data, 0, i))
        raw = builder.bitcast(data, _BYTES)
        count = builder.trunc(values[1], _INT)
        done = builder.append_basic_block("team_done")
        alone = builder.append_basic_block("team_of_one")
        choice = builder.switch(entry, alone)
        for kind, arguments_of in (
            (_GOMP, lambda: [plain, raw, count, _INT(0)]),
            (_KMPC, lambda: [builder.inttoptr(location, _BYTES), _INT(1), with_ids, raw]),
        ):
            block = builder.append_basic_block("team_fork")
            choice.add_case(entry.type(kind), block)
            builder.position_at_end(block)
            _call(builder, fork, ir.VoidType(), arguments_of(), variadic=kind == _KMPC)
            builder.branch(done)
        builder.position_at_end(alone)
        builder.call(plain, [raw])
        builder.branch(done)
        builder.position_at_end(done)
        failed = builder.load(cgutils.gep_inbounds(builder, data, 0, 2))
        return builder.sext(failed, llvm.I64)

    return types.int64(team, num_threads, worker, arguments), generate
