"""Kernels for static transitions, (C, C).

The functions of a `flash_semicrf.streaming.dispatch.Backend` and of a
`flash_semicrf.streaming.pieces.cutting.Cutting`, for float32 or float64 problems.
"""

from flash_semicrf.streaming.cpu.static.batch import (
    forward,
    gradients,
    gradients_of_pieces,
    in_lanes,
    log_partition,
    log_partition_of_pieces,
    messages,
)
from flash_semicrf.streaming.cpu.static.sampling import sample, sample_from
from flash_semicrf.streaming.cpu.static.tangents import tangents, tangents_of_pieces
from flash_semicrf.streaming.cpu.static.viterbi import max_messages, viterbi, viterbi_of_pieces

__all__ = [
    "forward",
    "gradients",
    "gradients_of_pieces",
    "in_lanes",
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
