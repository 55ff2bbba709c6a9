"""Kernels for transitions that depend on the duration of the segment arrived in."""

from flash_semicrf.streaming.triton.by_duration.decoding import max_messages, viterbi
from flash_semicrf.streaming.triton.by_duration.gradient import (
    gradients,
    log_partition,
    messages,
    sample,
)
from flash_semicrf.streaming.triton.by_duration.tangent import tangents

__all__ = [
    "gradients",
    "log_partition",
    "max_messages",
    "messages",
    "sample",
    "tangents",
    "viterbi",
]
