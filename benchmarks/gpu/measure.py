"""Check, then time, the public calls on one device."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.children.ours import (
    VALUE_TOLERANCE,
    CheckFailed,
    check_identities,
    job_call,
    make_potentials,
    relative_error,
    require,
)
from benchmarks.gpu.problems import JOBS, problem
from benchmarks.problems import Problem, make_inputs
from benchmarks.processes import ROOT
from flash_semicrf import log_partition, viterbi
from flash_semicrf.problem.potentials import Potentials

CHECK_SEQUENCES, CHECK_POSITIONS, CHECK_DURATIONS = 2, 200, 330
"""Largest size of the problem that is compared with the float64 loop, whose cost grows with T
squared. So many durations run in parts (`streaming.triton.static.plan`), as more do."""

GRADIENT_TOLERANCE = 1e-5
"""Relative to the largest element: gradients come in float32."""

WARM_UP_SECONDS = 0.5
"""An idle device lowers its clocks, and takes a while to raise them."""

MIN_REPEATS, MAX_REPEATS = 20, 100

Record = dict[str, Any]


def synchronize(device: str) -> None:
    """Wait for a CUDA device; nothing on others."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For the loop's many small operations: waking threads for each would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_against_reference(inputs: dict[str, np.ndarray], device: str) -> None:
    """Log Z, every gradient and the best scores against the float64 loop on the CPU.

    Raises
    ------
    CheckFailed
        Where one of them differs.
    """
    ours = make_potentials(inputs, device=device)
    exact = make_potentials(inputs, np.float64)
    with _one_thread():
        expected = job_call(exact, "log_partition_gradient", backend="reference")()
        decoded = viterbi(make_potentials(inputs, np.float64), backend="reference")
    log_z = job_call(ours, "log_partition_gradient")()
    require("log Z", relative_error(log_z.cpu(), expected), VALUE_TOLERANCE)
    references = exact.parameters()
    for name, leaf in ours.parameters().items():
        error = relative_error(leaf.grad.cpu(), references[name].grad)
        require(f"gradient of {name}", error, GRADIENT_TOLERANCE)
    found = viterbi(make_potentials(inputs, device=device))
    require("decode", relative_error(found.scores.cpu(), decoded.scores), VALUE_TOLERANCE)


def check_whole(whole: Problem, device: str) -> float:
    """Log Z of the whole problem against a run on float64 inputs; every identity of its results.

    Returns
    -------
    float
        Relative error of log Z.
    """
    inputs = make_inputs(whole)
    potentials = make_potentials(inputs, device=device)
    with torch.no_grad():
        log_z = log_partition(potentials)
        exact = log_partition(make_potentials(inputs, np.float64, device))
    error = require("log Z in float64", relative_error(log_z, exact), VALUE_TOLERANCE)
    for job in ("decode", "log_partition_gradient"):  # the latter makes leaves of the parameters
        result = job_call(potentials, job)()
        check_identities(replace(whole, job=job), potentials, result)
    return error


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Most device memory that a call holds beyond what was held before; its result counts."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def time_repeats(
    call: Callable[[], Any], device: str, budget_seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of each of 20 to 100 calls: by the host's clock, and by events on the device.

    The device is idle before a call and done with it when the clock is read. Between events lies
    also the time for which the device waits for the host.
    """
    host, events = [], []
    cuda = torch.device(device).type == "cuda"
    began = time.perf_counter()
    while len(host) < MIN_REPEATS or (
        len(host) < MAX_REPEATS and time.perf_counter() - began < budget_seconds
    ):
        synchronize(device)
        if cuda:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        if cuda:
            marks[0].record()
        call()
        if cuda:
            marks[1].record()
        synchronize(device)
        host.append(1e3 * (time.perf_counter() - start))
        if cuda:
            events.append(marks[0].elapsed_time(marks[1]))
    return host, events


def measure(
    potentials: Potentials, job: str, device: str, budget_seconds: float
) -> dict[str, float | int | None]:
    """Time and memory of one job; see the columns of `benchmarks.gpu.report`."""
    call = job_call(potentials, job)
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_SECONDS:
        call()
        synchronize(device)
    for leaf in potentials.parameters().values():
        leaf.grad = None
    peak = peak_extra_bytes(call, device)
    host, events = time_repeats(call, device, budget_seconds)
    quartiles = statistics.quantiles(host, n=4, method="inclusive")
    return {
        "median_ms": statistics.median(host),
        "q1_ms": quartiles[0],
        "q3_ms": quartiles[2],
        "min_ms": min(host),
        "repeats": len(host),
        "events_median_ms": statistics.median(events) if events else None,
        "peak_bytes": peak,
    }


def check(name: str, device: str) -> float:
    """Check all jobs on one shape.

    Returns
    -------
    float
        Relative error of log Z.

    Raises
    ------
    CheckFailed
        Where something differs.
    """
    whole = problem(name)
    small = replace(
        whole,
        B=min(CHECK_SEQUENCES, whole.B),
        T=min(CHECK_POSITIONS, whole.T),
        K=min(CHECK_DURATIONS, whole.K),
    )
    check_against_reference(make_inputs(small), device)
    return check_whole(whole, device)


def compile_kernels(names: list[str], device: str) -> None:
    """Check the shapes once in processes of their own, all at once, and ignore the outcome.

    Compilation takes far longer than all else, and what these processes compile the later ones
    find in Triton's cache on the disk.
    """
    first = {}  # of the shapes with the same kernels, which would compile them at the same time
    for name in names:
        shape = problem(name)
        first.setdefault((shape.C, shape.K >= CHECK_DURATIONS, shape.tail), name)
    program = "import sys; from benchmarks.gpu.measure import check; check(*sys.argv[1:])"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, device],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in first.values()
    ]
    for process in running:
        process.wait()


def run_shape(name: str, device: str, budget_seconds: float) -> Iterator[Record]:
    """Records of all jobs on one shape; nothing is timed where a check fails."""
    whole = problem(name)
    shape = {key: getattr(whole, key) for key in ("B", "T", "K", "C", "dtype")}
    try:
        error = check(name, device)
    except CheckFailed as failure:
        for job in JOBS:
            yield {"problem": name, "job": job, **shape, "status": f"failed: {failure}"}
        return
    inputs = make_inputs(whole)
    for job in JOBS:
        potentials = make_potentials(inputs, device=device)
        record = measure(potentials, job, device, budget_seconds)
        checked = {"status": "ok", "check_error": error}
        yield {"problem": name, "job": job, **shape, **checked, **record}
