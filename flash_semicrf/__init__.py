"""Exact, fast inference and training for semi-Markov conditional random fields in PyTorch."""

from flash_semicrf._version import __version__
from flash_semicrf.distribution import SemiCRFDistribution
from flash_semicrf.duration import (
    CallableDuration,
    GeometricDuration,
    LearnedDuration,
    NegativeBinomialDuration,
    PoissonDuration,
    UniformDuration,
    create_duration_distribution,
)
from flash_semicrf.marginals import SegmentMarginals
from flash_semicrf.minimum_risk import minimum_risk
from flash_semicrf.nbest import NBestResult, n_best
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.potentials import Potentials
from flash_semicrf.sampling import sample
from flash_semicrf.segments import Segment, SegmentTable, ViterbiResult
from flash_semicrf.streaming import semi_crf_streaming_forward
from flash_semicrf.uncertainty import UncertaintySemiMarkovCRFHead

__all__ = [
    "CallableDuration",
    "GeometricDuration",
    "LearnedDuration",
    "NBestResult",
    "NegativeBinomialDuration",
    "PoissonDuration",
    "Potentials",
    "Segment",
    "SegmentMarginals",
    "SegmentTable",
    "SemiCRFDistribution",
    "SemiMarkovCRFHead",
    "UncertaintySemiMarkovCRFHead",
    "UniformDuration",
    "ViterbiResult",
    "__version__",
    "create_duration_distribution",
    "minimum_risk",
    "n_best",
    "sample",
    "semi_crf_streaming_forward",
]
