"""Kernels for transitions that do not depend on the duration."""

from flash_semicrf.streaming.triton.sampling import sample_from
from flash_semicrf.streaming.triton.static.decoding import max_messages, viterbi
from flash_semicrf.streaming.triton.static.gradient import gradients, log_partition
from flash_semicrf.streaming.triton.static.log_messages import forward, messages, sample
from flash_semicrf.streaming.triton.static.pieces import (
    gradients_of_pieces,
    log_partition_of_pieces,
    viterbi_of_pieces,
)
from flash_semicrf.streaming.triton.static.tangent import tangents, tangents_of_pieces

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
