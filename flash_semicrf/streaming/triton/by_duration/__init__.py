"""Kernels for transitions that depend on the duration of the segment arrived in."""

from flash_semicrf.streaming.triton.by_duration.decoding import max_messages, viterbi
from flash_semicrf.streaming.triton.by_duration.gradient import (
    forward,
    gradients,
    log_partition,
    messages,
    sample,
)
from flash_semicrf.streaming.triton.by_duration.pieces import (
    gradients_of_pieces,
    log_partition_of_pieces,
    viterbi_of_pieces,
)
from flash_semicrf.streaming.triton.by_duration.tangent import tangents, tangents_of_pieces
from flash_semicrf.streaming.triton.sampling import sample_from

__all__ = [
    "forward",
    "gradients",
    "gradients_of_pieces",
    "log_partition",
    "log_partition_of_pieces",
    "max_messages",
    "messages",
    "sample",
    "sample_from",
    "tangents",
    "tangents_of_pieces",
    "viterbi",
    "viterbi_of_pieces",
]
