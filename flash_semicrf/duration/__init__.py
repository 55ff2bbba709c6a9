"""Duration distributions: modules that give every duration 1..K a score for each of C labels."""

from __future__ import annotations

from .base import DurationDistribution
from .factory import DURATION_DISTRIBUTIONS, create_duration_distribution
from .free import CallableDuration, LearnedDuration
from .parametric import (
    GeometricDuration,
    NegativeBinomialDuration,
    PoissonDuration,
    UniformDuration,
)
from .tail import GeometricTail, create_duration_tail

__all__ = [
    "DURATION_DISTRIBUTIONS",
    "CallableDuration",
    "DurationDistribution",
    "GeometricDuration",
    "GeometricTail",
    "LearnedDuration",
    "NegativeBinomialDuration",
    "PoissonDuration",
    "UniformDuration",
    "create_duration_distribution",
    "create_duration_tail",
]
