"""Kernels for transitions that do not depend on the duration."""

from flash_semicrf.streaming.triton.static.decoding import max_messages, viterbi
from flash_semicrf.streaming.triton.static.gradient import gradients, log_partition
from flash_semicrf.streaming.triton.static.log_messages import messages, sample
from flash_semicrf.streaming.triton.static.tangent import tangents

__all__ = [
    "gradients",
    "log_partition",
    "max_messages",
    "messages",
    "sample",
    "tangents",
    "viterbi",
]
