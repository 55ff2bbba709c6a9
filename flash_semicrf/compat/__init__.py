"""Names and call forms kept for compatibility with release 0.2.0."""

from flash_semicrf.compat.backpointers import semi_crf_streaming_viterbi_with_backpointers
from flash_semicrf.compat.cumulative import (
    compute_edge_block_streaming,
    semi_crf_streaming_forward,
)
from flash_semicrf.compat.streaming import SemiCRFStreaming
from flash_semicrf.compat.triton import (
    HAS_TRITON,
    SemiCRFStreamingTriton,
    launch_streaming_triton_backward,
    launch_streaming_triton_kernel,
    launch_streaming_triton_kernel_max_bp,
    semi_crf_streaming_viterbi_triton,
)
from flash_semicrf.problem.potentials import NEG_INF

__all__ = [
    "HAS_TRITON",
    "NEG_INF",
    "SemiCRFStreaming",
    "SemiCRFStreamingTriton",
    "compute_edge_block_streaming",
    "launch_streaming_triton_backward",
    "launch_streaming_triton_kernel",
    "launch_streaming_triton_kernel_max_bp",
    "semi_crf_streaming_forward",
    "semi_crf_streaming_viterbi_triton",
    "semi_crf_streaming_viterbi_with_backpointers",
]
