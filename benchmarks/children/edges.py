"""Check, then time, the exact engine's vectorised scan with gradient, in a process of its own.

Run as ``python -m benchmarks.children.edges PROBLEM OUTPUT.json BUDGET MAX_REPEATS``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.children.measure import measure
from benchmarks.children.ours import CheckFailed, relative_error, require
from benchmarks.problems import PROBLEMS, Problem, make_inputs
from flash_semicrf import SemiMarkov
from flash_semicrf.semirings import LogSemiring

WARM_UP_POSITIONS = 8

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
"""Relative to the largest element: the engine computes in the dtype of the edges."""


def make_edges(problem: Problem, num_positions: int | None = None) -> Tensor:
    """The edge tensor (B, T-1, K, C, C) of a problem, a leaf that requires a gradient."""
    return torch.from_numpy(make_inputs(problem, num_positions)["edges"]).requires_grad_()


def job_call(edges: Tensor, *, use_vectorized: bool = True) -> Callable[[], Tensor]:
    """A function without arguments that returns log Z (B,) and leaves the gradient in `edges`."""
    engine = SemiMarkov(LogSemiring)

    def call() -> Tensor:
        edges.grad = None
        value = engine.logpartition(edges, use_linear_scan=True, use_vectorized=use_vectorized)[0]
        value.sum().backward()
        return value[0].detach()

    return call


def check_against_loop(problem: Problem, edges: Tensor) -> float:
    """Compare log Z and its gradient with the scan position by position in float64.

    Returns
    -------
    float
        Relative error of log Z.
    """
    exact = edges.detach().double().requires_grad_()
    actual, expected = job_call(edges)(), job_call(exact, use_vectorized=False)()
    tolerance = TOLERANCE[problem.dtype]
    require("gradient of edges", relative_error(edges.grad, exact.grad), tolerance)
    # Every path covers each of the T-1 steps once.
    by_duration = edges.grad.double().sum((0, 1, 3, 4))
    covered = (by_duration * torch.arange(problem.K)).sum().item()
    total = problem.B * (problem.T - 1)
    require("expected sum of durations / (T-1) - 1", abs(covered / total - 1), tolerance)
    return require("log Z", relative_error(actual, expected), tolerance)


def run_problem(problem: Problem, budget_seconds: float, max_repeats: int) -> dict[str, Any]:
    """Check and measure one problem; the record says so where the check fails."""
    edges = make_edges(problem)
    try:
        error = check_against_loop(problem, edges)
    except CheckFailed as failure:
        return {"status": f"failed: {failure}"}
    edges.grad = None  # its memory is part of the job
    record, value = measure(
        job_call(edges),
        job_call(make_edges(problem, WARM_UP_POSITIONS)),
        budget_seconds=budget_seconds,
        max_repeats=max_repeats,
    )
    return record | {"status": "ok", "value": value.tolist(), "check_error": error}


def main(argv: list[str]) -> None:
    """Measure one problem and write its record."""
    name, output, budget, max_repeats = argv
    record = run_problem(PROBLEMS[name], float(budget), int(max_repeats))
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
