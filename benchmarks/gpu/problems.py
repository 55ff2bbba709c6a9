"""Problems of the GPU benchmarks, and the figures that each is meant to reach."""

from __future__ import annotations

from benchmarks.problems import Problem

JOBS = {
    "log_partition": "log Z",
    "log_partition_gradient": "log Z + gradient",
    "decode_table": "decode to tensors",
    "decode": "decode to Segment lists",
}
"""Jobs of `benchmarks.children.ours.job_call`, and their names in tables."""

SHAPES = {
    "k100": (4, 1000, 100, 24),
    "k100-tail": (4, 1000, 100, 24),
    "k32": (32, 1000, 32, 8),
    "k100-long": (8, 10_000, 100, 24),
    "k1000-long": (1, 10_000, 1000, 24),
    "k100-batch": (256, 1000, 100, 24),
    "labels64": (64, 200, 16, 64),
    "million": (1, 1_000_000, 100, 24),
    "million-8": (1, 1_000_000, 100, 8),
}
"""B, T, K, C."""

TAILS = {"k100-tail"}
"""Those with a duration tail, which may cost 1.3 times what the same shape costs without."""

ASKED_MS = {
    "k100": (0.5, 1.1, 1.5, 3.0),
    "k100-tail": (0.65, 1.43, 1.95, 3.9),
    "k32": (0.4, 0.8, 1.0, 2.0),
    "k100-long": (2, 3.5, 5, 10),
    "k1000-long": (4.5, 8, 9, 18),
    "k100-batch": (1.2, 3.5, 3.5, 7),
    "labels64": (0.25, 0.7, 0.8, 1.6),
    "million": (10, 25, 30, 60),
    "million-8": (6, 15, 20, 40),
}
"""Longest median, in ms, on one H100: a figure for each of `JOBS`, in their order. Lists may take
twice what tensors do."""

ASKED_MEMORY = {"log_partition_gradient": 6.0}
"""Largest peak of extra memory, in sizes of the float32 scores."""


def problem(name: str, job: str = "log_partition") -> Problem:
    """The problem of a shape of `SHAPES`: float32 inputs, every sequence of length T."""
    return Problem(name, *SHAPES[name], job=job, tail=name in TAILS)


def asked_ms(name: str, job: str) -> float:
    """The figure to be reached."""
    return ASKED_MS[name][list(JOBS).index(job)]
