"""Exact, fast inference and training for semi-Markov conditional random fields in PyTorch."""

import flash_semicrf.forking  # noqa: F401 - children of this process start with one thread
from flash_semicrf._version import __version__
from flash_semicrf.compat.cumulative import semi_crf_streaming_forward
from flash_semicrf.duration import (
    CallableDuration,
    GeometricDuration,
    LearnedDuration,
    NegativeBinomialDuration,
    PoissonDuration,
    UniformDuration,
    create_duration_distribution,
)
from flash_semicrf.exact.semimarkov import SemiMarkov
from flash_semicrf.inference.consensus import consensus
from flash_semicrf.inference.distribution import SemiCRFDistribution
from flash_semicrf.inference.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.minimum_risk import minimum_risk
from flash_semicrf.inference.nbest import NBestResult, n_best
from flash_semicrf.inference.posterior import segment_marginals, segment_probabilities
from flash_semicrf.inference.sampling import sample
from flash_semicrf.inference.viterbi import viterbi
from flash_semicrf.inference.viterbi_labels import viterbi_labels
from flash_semicrf.nn.head import SemiMarkovCRFHead
from flash_semicrf.nn.uncertainty import UncertaintySemiMarkovCRFHead
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import Segment, Segments, SegmentTable, ViterbiResult
from flash_semicrf.sparse import (
    BandedMatrix,
    BlockTriangularMatrix,
    apply_permutation,
    block_triang_matmul,
    measure_effective_bandwidth,
    rcm_ordering_from_adjacency,
    snake_ordering,
)

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
    "Segments",
    "SemiCRFDistribution",
    "SemiMarkov",
    "SemiMarkovCRFHead",
    "UncertaintySemiMarkovCRFHead",
    "UniformDuration",
    "ViterbiResult",
    "__version__",
    "apply_permutation",
    "block_triang_matmul",
    "consensus",
    "create_duration_distribution",
    "cross_entropy",
    "entropy",
    "kl_divergence",
    "log_partition",
    "measure_effective_bandwidth",
    "minimum_risk",
    "n_best",
    "position_entropy",
    "rcm_ordering_from_adjacency",
    "sample",
    "segment_marginals",
    "segment_probabilities",
    "semi_crf_streaming_forward",
    "snake_ordering",
    "viterbi",
    "viterbi_labels",
]
