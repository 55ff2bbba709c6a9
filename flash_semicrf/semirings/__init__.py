"""Semirings of the exact engine. `Semiring` is the base class of user-defined ones."""

from flash_semicrf.semirings.base import Semiring
from flash_semicrf.semirings.cross_entropy import CrossEntropySemiring
from flash_semicrf.semirings.entropy import EntropySemiring
from flash_semicrf.semirings.kl_divergence import KLDivergenceSemiring
from flash_semicrf.semirings.kmax import KMaxSemiring
from flash_semicrf.semirings.log import LogSemiring
from flash_semicrf.semirings.max import MaxSemiring
from flash_semicrf.semirings.std import StdSemiring

__all__ = [
    "CrossEntropySemiring",
    "EntropySemiring",
    "KLDivergenceSemiring",
    "KMaxSemiring",
    "LogSemiring",
    "MaxSemiring",
    "Semiring",
    "StdSemiring",
]
