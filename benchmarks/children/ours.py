"""Check, then time, this package on one registered problem, in a process of its own.

Run as ``python -m benchmarks.children.ours PROBLEM OUTPUT.json BUDGET MAX_REPEATS``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.children.measure import measure
from benchmarks.problems import PROBLEMS, Problem, make_inputs
from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.compat import semi_crf_streaming_forward
from flash_semicrf.inference.information import entropy
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import ViterbiResult, segments_to_table

WARM_UP_POSITIONS = 8

GRADIENT_CHECK_POSITIONS = 1000

VALUE_TOLERANCE = 1e-9
"""Relative, of log Z and of path scores: both accumulate in float64 whatever the inputs are."""

GRADIENT_TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
"""Relative to the largest element: gradients have the dtype of the inputs."""


class CheckFailed(RuntimeError):
    """A result differs from its reference: there is nothing worth timing."""


def make_potentials(
    inputs: dict[str, np.ndarray], dtype: type | None = None, device: str = "cpu"
) -> Potentials:
    """The inputs of a problem as tensors of their own, of another real dtype where one is given."""
    arrays = {
        name: np.array(value, dtype=value.dtype if name == "lengths" else dtype)
        for name, value in inputs.items()
    }
    tensors = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
    return Potentials(**tensors)


def job_call(potentials: Potentials, job: str, backend: str = "auto") -> Callable[[], Any]:
    """A function without arguments that does the job once.

    "log_partition" and "log_partition_gradient" return log Z (B,); the gradients are left in the
    ``grad`` of the parameters. "decode" returns a `ViterbiResult`, "decode_table" the scores and
    a `SegmentTable`. "posterior" returns the entropy (B,) after marginals, it and 100 samples of
    each sequence; "entropy_gradient" is "log_partition_gradient" of the entropy.
    "streaming_forward" returns log Z (B,) of cumulative scores that are taken beforehand.
    """
    if job == "decode":
        return lambda: viterbi(potentials, backend=backend)
    if job == "decode_table":
        return lambda: viterbi_table(potentials, backend=backend)
    if job == "log_partition":

        def forward() -> Tensor:
            with torch.no_grad():
                return log_partition(potentials, backend=backend)

        return forward
    if job == "posterior":

        def posterior() -> Tensor:
            with torch.no_grad():
                segment_marginals(potentials, backend=backend)
                sample_table(potentials, 100, seed=0, backend=backend)
                return entropy(potentials, backend=backend)

        return posterior
    if job == "streaming_forward":
        p = potentials
        cum_scores = pad(p.scores.double().cumsum(1), (0, 0, 1, 0))
        arguments = (cum_scores, p.transition, p.duration_bias, p.lengths, p.max_duration)
        return lambda: semi_crf_streaming_forward(*arguments, backend=backend)
    function = entropy if job == "entropy_gradient" else log_partition
    leaves = [leaf.requires_grad_() for leaf in potentials.parameters().values()]

    def forward_backward() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = function(potentials, backend=backend)
        value.sum().backward()
        return value.detach()

    return forward_backward


def require(name: str, error: float, tolerance: float) -> float:
    """Return `error`; raise `CheckFailed` where it is above the tolerance, or NaN."""
    if not error <= tolerance:
        raise CheckFailed(f"{name}: error {error:.2e}, at most {tolerance:.0e} allowed")
    return error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element expected (1 where that is smaller)."""
    scale = max(1.0, expected.abs().max().item())
    return (actual.double() - expected.double()).abs().max().item() / scale


def check_against_reference(problem: Problem) -> float:
    """Compare with the float64 loop, on the shortened problem where there is one.

    Returns
    -------
    float
        Relative error of log Z, or of the scores of the best paths.
    """
    if problem.job in ("log_partition_gradient", "entropy_gradient"):
        _check_gradients(problem)
    inputs = make_inputs(problem, problem.check_positions)
    potentials = make_potentials(inputs)
    exact = make_potentials(inputs, np.float64)
    actual = job_call(potentials, problem.job)()
    if problem.job == "decode":
        # Not segment by segment: two neighbours of one label may swap their durations without
        # changing the score, so that best paths tie and rounding chooses.
        _check_tiling(potentials, actual)
        actual, expected = actual.scores, viterbi(exact, backend="reference").scores
    elif problem.job in ("posterior", "entropy_gradient"):
        with torch.no_grad():
            expected = entropy(exact, backend="reference")
    else:
        expected = job_call(exact, "log_partition", backend="reference")()
    return require(problem.job, relative_error(actual, expected), VALUE_TOLERANCE)


def _check_gradients(problem: Problem) -> None:
    """Every gradient against autograd through the loop, whose cost grows with the square of T."""
    inputs = make_inputs(problem, min(problem.T, GRADIENT_CHECK_POSITIONS))
    potentials, exact = make_potentials(inputs), make_potentials(inputs, np.float64)
    job_call(potentials, problem.job)()
    job_call(exact, problem.job, backend="reference")()
    references = exact.parameters()
    for name, leaf in potentials.parameters().items():
        error = relative_error(leaf.grad, references[name].grad)
        require(f"gradient of {name}", error, GRADIENT_TOLERANCE[problem.dtype])


def check_identities(problem: Problem, potentials: Potentials, result: Any) -> None:
    """Identities of the result on the whole problem, whatever its size."""
    if problem.job == "decode":
        _check_tiling(potentials, result)
    elif problem.job == "log_partition_gradient":
        tolerance = GRADIENT_TOLERANCE[problem.dtype]
        positions = potentials.scores.grad.double().sum(-1)
        error = (positions - 1).abs().max().item()
        require("sum over labels of position marginals - 1", error, tolerance)
        by_duration = potentials.duration_bias.grad.double().sum(1)
        total = problem.B * problem.T
        covered = (by_duration * torch.arange(1, problem.K + 1).to(by_duration)).sum().item()
        if problem.tail:
            covered += potentials.duration_tail.grad.double().sum().item()
        require("expected sum of durations / T - 1", abs(covered / total - 1), tolerance)
        segments = by_duration.sum().item()
        transitions = potentials.transition.grad.double().sum().item()
        error = abs(transitions / segments - 1)
        require("expected transitions / expected segments - 1", error, tolerance)


def _check_tiling(potentials: Potentials, result: ViterbiResult) -> None:
    """Segments tile each sequence, none is too long, and they have the score reported."""
    for length, segments in zip(potentials.lengths.tolist(), result.segments, strict=True):
        ends = [-1, *(segment.end for segment in segments)]
        if ends[-1] != length - 1 or [s.start - 1 for s in segments] != ends[:-1]:
            raise CheckFailed("decode: the segments do not tile the sequence")
        longest = max(segment.duration for segment in segments)
        if potentials.duration_tail is None and longest > potentials.max_duration:
            raise CheckFailed("decode: a segment is longer than K")
    exact = potentials.to(torch.float64)
    table = segments_to_table(result.segments, device=exact.device)
    scores = score_segments(exact, table)
    require("decode: score of the path", relative_error(result.scores, scores), VALUE_TOLERANCE)


def run_problem(problem: Problem, budget_seconds: float, max_repeats: int) -> dict[str, Any]:
    """Check and measure one problem; the record says so where a check fails."""
    try:
        error = check_against_reference(problem)
        potentials = make_potentials(make_inputs(problem))
        tiny = make_potentials(make_inputs(problem, WARM_UP_POSITIONS))
        record, result = measure(
            job_call(potentials, problem.job),
            job_call(tiny, problem.job),
            budget_seconds=budget_seconds,
            max_repeats=max_repeats,
        )
        check_identities(problem, potentials, result)
    except CheckFailed as failure:
        return {"status": f"failed: {failure}"}
    value = result.scores if problem.job == "decode" else result
    return record | {"status": "ok", "value": value.tolist(), "check_error": error}


def main(argv: list[str]) -> None:
    """Measure one problem and write its record."""
    name, output, budget, max_repeats = argv
    record = run_problem(PROBLEMS[name], float(budget), int(max_repeats))
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
