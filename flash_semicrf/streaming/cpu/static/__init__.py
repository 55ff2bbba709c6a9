"""Kernels for static transitions, (C, C).

The functions of a `flash_semicrf.streaming.dispatch.Backend`, for float32 or float64 problems.
"""

from flash_semicrf.streaming.cpu.static.batch import gradients, log_partition, messages
from flash_semicrf.streaming.cpu.static.sampling import sample
from flash_semicrf.streaming.cpu.static.tangents import tangents
from flash_semicrf.streaming.cpu.static.viterbi import max_messages, viterbi

__all__ = [
    "gradients",
    "log_partition",
    "max_messages",
    "messages",
    "sample",
    "tangents",
    "viterbi",
]
