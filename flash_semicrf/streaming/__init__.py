"""Exact inference that never builds an edge tensor: log Z, gradients, marginals, decoding."""

from flash_semicrf.potentials import NEG_INF
from flash_semicrf.streaming.autograd import SemiCRFStreaming
from flash_semicrf.streaming.backpointers import semi_crf_streaming_viterbi_with_backpointers
from flash_semicrf.streaming.interface import (
    compute_edge_block_streaming,
    log_partition,
    semi_crf_streaming_forward,
    viterbi,
    viterbi_table,
)
from flash_semicrf.streaming.posterior import segment_marginals, segment_probabilities
from flash_semicrf.streaming.triton_api import (
    HAS_TRITON,
    SemiCRFStreamingTriton,
    launch_streaming_triton_backward,
    launch_streaming_triton_kernel,
    launch_streaming_triton_kernel_max_bp,
    semi_crf_streaming_viterbi_triton,
)

__all__ = [
    "HAS_TRITON",
    "NEG_INF",
    "SemiCRFStreaming",
    "SemiCRFStreamingTriton",
    "compute_edge_block_streaming",
    "launch_streaming_triton_backward",
    "launch_streaming_triton_kernel",
    "launch_streaming_triton_kernel_max_bp",
    "log_partition",
    "segment_marginals",
    "segment_probabilities",
    "semi_crf_streaming_forward",
    "semi_crf_streaming_viterbi_triton",
    "semi_crf_streaming_viterbi_with_backpointers",
    "viterbi",
    "viterbi_table",
]
