"""Kernels with a value for each label and duration at every position.

For transitions that depend on the duration of the segment arrived in, and for scores of segments
and of transitions by position, with either kind of transitions.

The functions of a `flash_semicrf.streaming.dispatch.Backend` and of a
`flash_semicrf.streaming.pieces.cutting.Cutting`, for float32 or float64 problems.
"""

from flash_semicrf.streaming.cpu.by_duration.batch import (
    forward,
    gradients,
    gradients_of_pieces,
    in_lanes,
    log_partition,
    log_partition_of_pieces,
    messages,
)
from flash_semicrf.streaming.cpu.by_duration.sampling import sample, sample_from
from flash_semicrf.streaming.cpu.by_duration.tangents import tangents
from flash_semicrf.streaming.cpu.by_duration.viterbi import max_messages, viterbi, viterbi_of_pieces

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
    "viterbi",
    "viterbi_of_pieces",
]
