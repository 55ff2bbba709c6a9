"""Kernels for transitions that depend on the duration of the segment arrived in.

The functions of a `flash_semicrf.streaming.dispatch.Backend`, for float32 or float64 problems.
"""

from flash_semicrf.streaming.cpu.by_duration.batch import gradients, log_partition, messages
from flash_semicrf.streaming.cpu.by_duration.sampling import sample
from flash_semicrf.streaming.cpu.by_duration.tangents import tangents
from flash_semicrf.streaming.cpu.by_duration.viterbi import max_messages, viterbi

__all__ = [
    "gradients",
    "log_partition",
    "max_messages",
    "messages",
    "sample",
    "tangents",
    "viterbi",
]
