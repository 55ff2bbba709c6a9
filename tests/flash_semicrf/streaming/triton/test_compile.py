"""Every kernel compiled ahead of time for each kind of GPU, within a budget of register spills."""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import multiprocessing
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from flash_semicrf.streaming import triton as package
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.streaming.triton.backend import HAS_TRITON
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import long

pytestmark = [
    pytest.mark.triton,
    pytest.mark.xdist_group("compile"),
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]

CAPABILITIES = (80, 89, 90)

WITHOUT_FAST_FLOAT64 = (86, 89, 120)
"""Kinds of GPU whose float64 units are 64 times fewer than those of float32."""

SPILLS = {
    "apart_boundary_kernel": 900,  # as `boundary_kernel`
    "apart_durations_kernel": 0,
    "apart_kernel": 0,
    "boundary_kernel": 900,  # 670 to 760 measured, at 255 registers: three matrices are held
    "carry_kernel": 0,
    "closing_kernel": 0,
    "duration_gradient_kernel": 0,
    "duration_last_segment_kernel": 0,
    "duration_last_segment_kernel with a tail": 0,
    "duration_pass_kernel": 0,
    "duration_pass_kernel with a tail": 0,
    "duration_start_kernel": 48,  # 24 measured, at 8.0
    "duration_start_kernel with a tail": 0,
    "duration_start_tangent_kernel": 0,
    "duration_start_tangent_kernel with a tail": 0,
    "duration_tangent_kernel": 0,
    "duration_tangent_kernel with a tail": 0,
    "duration_tangent_pass_kernel": 0,
    "duration_tangent_pass_kernel with a tail": 0,
    "duration_tangent_terms_kernel": 48,  # 24 measured, at 8.9
    "duration_tangent_terms_kernel with a tail": 0,
    "duration_terms_kernel": 0,
    "duration_terms_kernel with a tail": 0,
    "duration_traceback_kernel": 0,
    "duration_traceback_kernel with a tail": 0,
    "far_kernel": 0,
    "far_kernel of maxima": 0,
    "far_kernel of maxima with a tail": 48,  # 32 measured
    "finish_kernel": 0,
    "flags_kernel": 0,
    "join_kernel": 0,
    "last_segment_kernel": 0,
    "last_segment_kernel with a tail": 0,
    "log_messages_kernel": 0,
    "longer_gradient_kernel with a tail": 0,
    "longer_segment_kernel with a tail": 0,
    "max_pass_kernel": 0,
    "max_pass_kernel with a tail": 0,
    "narrow_boundary_kernel": 0,
    "narrow_durations_kernel": 0,
    "pass_kernel": 600,  # 310 to 470 measured, at 255 registers; half without boundary scores
    "pass_kernel of halves": 600,  # 390 measured
    "pass_kernel with a tail": 600,
    "prefix_carry_kernel": 0,
    "prefix_kernel": 0,
    "prepare_kernel": 0,
    "prepare_kernel with a tail": 0,
    "previous_segment_kernel": 0,
    "sample_kernel": 0,
    "sample_kernel with a tail": 0,
    "scale_kernel": 0,
    "table_kernel": 0,
    "tail_tangent_kernel with a tail": 0,
    "tangent_pass_kernel": 32,  # 16 measured, at 8.9
    "tangent_pass_kernel with a tail": 0,
    "total_kernel": 0,
    "traceback_kernel": 0,
    "transition_tangent_kernel": 0,
    "transition_tangent_kernel with a tail": 0,
    "values_kernel": 0,
}
"""Bytes of register spills, stores and loads together, that are put up with."""

SHORT = [(name, CAPABILITIES[-1]) for name in SPILLS]
LONG = [
    (name, capability)
    for name in SPILLS
    for capability in CAPABILITIES[:-1]
    if not name.endswith("tail")
]
NARROW = [
    (name, capability)
    for name in SPILLS
    for capability in WITHOUT_FAST_FLOAT64
    if name.startswith("narrow") and capability not in CAPABILITIES
]
BUILDS = SHORT + [long(*build) for build in LONG + NARROW]
"""Builds that are tested: for the newest kind always, without duration tails for the others too."""


class Launch(NamedTuple):
    """One launch as the compiler takes it."""

    kernel: str
    module: str
    signature: dict[str, object]
    constants: dict[object, object]
    warps: int


def modules() -> list:
    """The modules of the package."""
    walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(info.name) for info in walk]


def tails(arguments: tuple) -> Iterator[object]:
    """The tail of every record that has room for one."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from [x.tail] if hasattr(x, "tail") else tails(x)


def record_launches() -> dict[str, Launch]:
    """The last launch of every kernel when 24 labels are computed on with all options on.

    Kernels that have a variant for duration tails come with and without, as "... with a tail".
    """
    from flash_semicrf.streaming.triton import static
    from flash_semicrf.streaming.triton.jit import launch, signature_of
    from flash_semicrf.streaming.triton.static import chunks
    from flash_semicrf.streaming.triton.values import flags_of, values_are_allowed

    launches = {}

    def record(kernel, grid, *arguments, num_warps, form=None, **constants):
        signature, values = signature_of(kernel, arguments, constants)
        name = kernel.fn.__name__
        key = f"{name} of maxima" if name == "far_kernel" and constants["MAX"] else name
        key = f"{name} of halves" if constants.get("HALVES") else key
        # The second, if any, is that of a direction: zeros where the problem has none.
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        if named.get("tail_ptr", next(tails(arguments), None)) is not None:
            key += " with a tail"
        launches[key] = Launch(name, kernel.fn.__module__, signature, values, num_warps)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in modules():
            if getattr(module, "launch", None) is launch:
                monkeypatch.setattr(module, "launch", record)
        # Nothing is computed: numbers of segments are read all the same.
        monkeypatch.setattr(torch, "empty", torch.zeros)
        options = itertools.product([(False, 400), (False, 33), (True, 33)], [False, True])
        for (by_duration, max_duration), tail in options:
            problem = random_problem(
                2, 400, max_duration, 24, by_duration=by_duration, boundary=True, ends=True,
                tail=tail, dtype=torch.float32,
            )  # fmt: skip
            BACKENDS["triton"].viterbi(problem)
            BACKENDS["triton"].log_partition(problem)
            with monkeypatch.context() as many:
                many.setattr(chunks, "FEW", 1)
                BACKENDS["triton"].gradients(problem, set(problem.parameters()))
            log_z, found = BACKENDS["triton"].gradients(problem, set(problem.parameters()))
            if not (by_duration or tail):
                static.gradients(problem, set(problem.parameters()), narrow=True)
            dtypes = {name: value.dtype for name, value in problem.parameters().items()}
            BACKENDS["triton"].scaled(found, log_z, log_z > 0, dtypes)
            BACKENDS["triton"].messages(problem)
            BACKENDS["triton"].sample(problem, 2, 0)
            BACKENDS["triton"].tangents(problem, problem, set(problem.parameters()))
            values_are_allowed(problem)
            flags_of(problem)
    return launches


def report_of(launch: Launch, capability: int) -> dict[str, int]:
    """Registers per thread and bytes of spills, as ptxas reports them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flash_semicrf.streaming.triton.compiler import compile_kernel

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants)
    compiled = compile_kernel(source, launch.warps, GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    ran = subprocess.run(
        [ptxas, "-v", f"-arch={architecture}", "-o", "/dev/null", "-"],
        input=ptx, capture_output=True, text=True, check=True,
    )  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", ran.stderr)
    arithmetic = re.findall(r"\b(?:add|sub|mul|fma|max|min|setp)\b[.\w]*\.f64\b", ptx)
    return {
        "float64": len(arithmetic),
        "registers": int(re.search(r"Used (\d+) registers", ran.stderr)[1]),
        "spills": sum(map(int, spills)),
    }


@pytest.fixture(scope="module")
def compiling(request, tmp_path_factory):
    """Future report of every build that is tested, from two processes."""
    launches = record_launches()
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    named = [call.params for call in calls if call is not None and "capability" in call.params]
    wanted = dict.fromkeys((params["name"], params["capability"]) for params in named)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Compile, whatever an earlier run left in the cache of the user; and do not interpret.
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            yield {
                (name, capability): pool.submit(report_of, launches[name], capability)
                for name, capability in wanted
            }
            pool.shutdown(cancel_futures=True)  # after a failure, under -x


@pytest.mark.parametrize(("name", "capability"), BUILDS)
def test_kernel_compiles_within_its_budget(name, capability, compiling):
    report = compiling[name, capability].result()
    assert report["spills"] <= SPILLS[name], report


def test_every_kernel_is_launched_and_has_a_budget():
    from triton.runtime import KernelInterface

    kernels = {
        name
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and name.endswith("_kernel")
    }
    launches = record_launches()
    assert kernels == {launch.kernel for launch in launches.values()}
    assert set(launches) == set(SPILLS)


@pytest.mark.parametrize("capability", [90, *map(long, WITHOUT_FAST_FLOAT64)])
@pytest.mark.parametrize("name", [name for name in SPILLS if name.startswith("narrow")])
def test_narrow_kernels_hardly_compute_in_float64(name, capability, compiling):
    # One addition a tile and label, and the rare branches; 4043 and 145 in the float64 kernels.
    assert compiling[name, capability].result()["float64"] <= 40
