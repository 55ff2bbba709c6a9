"""The registered problems and the figures that each is meant to reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

JOBS = (
    *("log_partition", "log_partition_gradient", "decode", "posterior", "entropy_gradient"),
    "streaming_forward",
)

EDGES_JOB = "edges_gradient"
"""log Z of an edge tensor and its gradient, by the vectorised scan of the exact engine."""


@dataclass(frozen=True)
class Goal:
    """A figure to reach: a measured quantity and its bound.

    Parameters
    ----------
    quantity : str
        "speedup": time of `other` (a peer) over ours, at least `bound`. "relative_time": our time
        over our time on `other` (a problem), at most `bound`. "seconds": our time, at most.
        "memory": peak extra bytes over the bytes of the scores in float64, at most.
        "relative_memory": our peak extra bytes over those of `other` (a peer), at most.
        "threads": time with one thread over that with all, at least. "busy": time with all threads
        while a core is busy over that with one thread while none is, at most.
    bound : float
    other : str, optional
        Name of a peer or of a problem.
    """

    quantity: str
    bound: float
    other: str | None = None


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape and the job to do on them.

    Parameters
    ----------
    name : str
    B, T, K, C : int
        Sequences, positions, longest duration, labels. Every sequence has length T. For
        "edges_gradient" they are those of an edge tensor (B, T-1, K, C, C).
    job : one of `JOBS`, or `EDGES_JOB`
        "posterior" is marginals with expected counts, entropy and 100 samples.
        "streaming_forward" is log Z from cumulative scores in float64.
    dtype : {"float32", "float64"}
    tail : bool
        With a duration tail: segments may be longer than K.
    seed : int
    check_positions : int, optional
        T of the shortened problem on which the result is compared with the float64 loop; the
        whole problem by default.
    peers : tuple of str
        The peers that can do the job in bearable time.
    goals : tuple of Goal
    """

    name: str
    B: int
    T: int
    K: int
    C: int
    job: str
    dtype: str = "float32"
    tail: bool = False
    seed: int = 0
    check_positions: int | None = None
    peers: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()


SEMI_MARKOV_PEERS = ("flash-semicrf", "torch-struct")

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            "k100-log-partition",
            *(4, 1000, 100, 24),
            job="log_partition",
            peers=SEMI_MARKOV_PEERS,
            goals=(Goal("speedup", 2500, "flash-semicrf"),),
        ),
        Problem(
            "k100-gradient",
            *(4, 1000, 100, 24),
            job="log_partition_gradient",
            peers=SEMI_MARKOV_PEERS,
            goals=(
                Goal("speedup", 4000, "flash-semicrf"),
                Goal("relative_time", 3, "k100-log-partition"),
            ),
        ),
        Problem(
            "k100-decode",
            *(4, 1000, 100, 24),
            job="decode",
            peers=SEMI_MARKOV_PEERS,
            goals=(Goal("relative_time", 2, "k100-log-partition"),),
        ),
        Problem(
            "k100-posterior",
            *(4, 1000, 100, 24),
            job="posterior",
            goals=(Goal("relative_time", 5, "k100-gradient"),),
        ),
        Problem(
            "k100-entropy-gradient",
            *(4, 1000, 100, 24),
            job="entropy_gradient",
            goals=(Goal("relative_time", 4, "k100-gradient"),),
        ),
        Problem(
            "k1000-log-partition",
            *(1, 10_000, 1000, 24),
            job="log_partition",
            check_positions=1500,
            goals=(Goal("seconds", 0.060),),
        ),
        Problem(
            "linear-crf-gradient",
            *(32, 500, 1, 16),
            job="log_partition_gradient",
            peers=("pytorch-crf", "torch-struct", "flash-semicrf"),
            goals=(Goal("speedup", 5, "pytorch-crf"),),
        ),
        Problem(
            "million-gradient",
            *(1, 1_000_000, 100, 8),
            job="log_partition_gradient",
            dtype="float64",
            check_positions=20_000,
            goals=(Goal("seconds", 10), Goal("memory", 6)),
        ),
        Problem(
            "exact-gradient",
            *(8, 256, 16, 8),
            job=EDGES_JOB,
            peers=("torch-struct",),
            goals=(Goal("speedup", 3, "torch-struct"), Goal("relative_memory", 1, "torch-struct")),
        ),
    )
}

SHAPES = {
    "k100": (4, 1000, 100, 24),
    "k100-long": (8, 4000, 100, 24),
    "short": (64, 200, 20, 12),
    "linear-crf": (32, 500, 1, 16),
}


def _threaded(shape: str, job: str, speedup: float = 1.75) -> Problem:
    """A problem of the groups `threads` and `busy`."""
    name = f"{shape}-{job.removeprefix('log_partition_').replace('_', '-')}"
    goals = (Goal("threads", speedup), Goal("busy", 1.5))
    return Problem(name, *SHAPES[shape], job=job, check_positions=200, goals=goals)


THREADED: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        _threaded("k100", "log_partition"),
        _threaded("k100", "log_partition_gradient"),
        _threaded("k100", "streaming_forward"),
        _threaded("k100-long", "log_partition", 1.9),
        _threaded("k100-long", "log_partition_gradient", 1.9),
        _threaded("short", "log_partition"),
        _threaded("short", "log_partition_gradient"),
        _threaded("linear-crf", "log_partition"),
        _threaded("linear-crf", "log_partition_gradient"),
    )
}
"""Measurements of the groups `threads` and `busy` (`benchmarks.threads`)."""


def make_inputs(problem: Problem, num_positions: int | None = None) -> dict[str, np.ndarray]:
    """Draw the inputs of a problem, or of the same problem with another T.

    The scores have mean zero over the positions, for each sequence and label: a peer which
    centres them in that way solves the same problem.

    Returns
    -------
    dict
        "scores" (B, T, C), "transition" (C, C), "duration_bias" (K, C), "duration_tail" (C,) where
        there is one, "lengths" (B,) int64; or "edges" (B, T-1, K, C, C) and "lengths".
    """
    T = problem.T if num_positions is None else num_positions
    rng = np.random.default_rng(problem.seed)
    lengths = np.full(problem.B, T, dtype=np.int64)
    if problem.job == EDGES_JOB:
        edges = rng.standard_normal((problem.B, T - 1, problem.K, problem.C, problem.C))
        return {"edges": edges.astype(problem.dtype), "lengths": lengths}
    parameters = {
        "transition": 0.3 * rng.standard_normal((problem.C, problem.C)),
        "duration_bias": 0.3 * rng.standard_normal((problem.K, problem.C)),
    }
    scores = rng.standard_normal((problem.B, T, problem.C))
    scores -= scores.mean(axis=1, keepdims=True)
    inputs = {"scores": scores, **parameters}
    if problem.tail:
        inputs["duration_tail"] = -rng.uniform(0.05, 0.5, problem.C)
    inputs = {name: value.astype(problem.dtype) for name, value in inputs.items()}
    inputs["lengths"] = lengths
    return inputs
