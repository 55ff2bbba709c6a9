"""Exact, fast inference and training for semi-Markov conditional random fields in PyTorch."""

import flash_semicrf.forking  # noqa: F401 - children of this process start with one thread
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
from flash_semicrf.observations import Constraints
from flash_semicrf.potentials import Potentials
from flash_semicrf.sampling import sample
from flash_semicrf.segments import Segment, SegmentTable, ViterbiResult
from flash_semicrf.semimarkov import SemiMarkov
from flash_semicrf.sparse import (
    BandedMatrix,
    BlockTriangularMatrix,
    apply_permutation,
    block_triang_matmul,
    measure_effective_bandwidth,
    rcm_ordering_from_adjacency,
    snake_ordering,
)
from flash_semicrf.streaming import semi_crf_streaming_forward
from flash_semicrf.uncertainty import UncertaintySemiMarkovCRFHead

__all__ = [
    "BandedMatrix",
    "BlockTriangularMatrix",
    "CallableDuration",
    "Constraints",
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
    "SemiMarkov",
    "SemiMarkovCRFHead",
    "UncertaintySemiMarkovCRFHead",
    "UniformDuration",
    "ViterbiResult",
    "__version__",
    "apply_permutation",
    "block_triang_matmul",
    "create_duration_distribution",
    "measure_effective_bandwidth",
    "minimum_risk",
    "n_best",
    "rcm_ordering_from_adjacency",
    "sample",
    "semi_crf_streaming_forward",
    "snake_ordering",
]
