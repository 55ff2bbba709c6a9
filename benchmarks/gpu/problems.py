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
}
"""B, T, K, C."""

TAILS = {"k100-tail"}
"""Those with a duration tail, which may cost 1.3 times what the same shape costs without."""

ASKED_MS = {
    "k100": (1.0, 2.2, 2.0, 2.0),
    "k100-tail": (1.3, 2.9, 2.6, 2.6),
    "k32": (0.55, 1.4, 1.3, 1.3),
    "k100-long": (10, 22, 20, 20),
    "k1000-long": (20, 45, 40, 40),
    "k100-batch": (1.3, 5, 4, 4),
    "labels64": (0.35, 1.0, 1.0, 1.0),
}
"""Longest median, in ms, on one H100: a figure for each of `JOBS`, in their order."""

ASKED_MEMORY = {"log_partition_gradient": 6.0}
"""Largest peak of extra memory, in sizes of the float32 scores."""


def problem(name: str, job: str = "log_partition") -> Problem:
    """The problem of a shape of `SHAPES`: float32 inputs, every sequence of length T."""
    return Problem(name, *SHAPES[name], job=job, tail=name in TAILS)


def asked_ms(name: str, job: str) -> float:
    """The figure to be reached."""
    return ASKED_MS[name][list(JOBS).index(job)]
