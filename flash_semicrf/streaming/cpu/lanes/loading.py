"""Rows of eight sequences put side by side, and taken apart again."""

from __future__ import annotations

from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper

__all__ = ["load_lanes", "store_lanes"]

_PORTION = 16
"""Positions of one lane before the next: what they are put into is still in the cache."""


@helper
def load_lanes(lanes, place, values, mirrored):
    """Put rows of eight sequences side by side, or from their ends; zeros after their ends."""
    work, sequences, lengths = lanes.work, lanes.sequences, lanes.lengths
    stride, num_labels = lanes.stride, lanes.num_labels
    num_positions = lengths[LANES - 1]
    for begin in range(0, num_positions, _PORTION):
        stop = min(begin + _PORTION, num_positions)
        for lane in range(LANES):
            first, length = sequences[lane] * stride, lengths[lane]
            for i in range(begin, stop):
                at = place + lane + i * num_labels * LANES
                if i < length:
                    row = (first + (length - 1 - i if mirrored else i)) * num_labels
                    for c in range(num_labels):
                        work[at + c * LANES] = values[row + c]
                else:
                    for c in range(num_labels):
                        work[at + c * LANES] = 0.0


@helper
def store_lanes(lanes, place, values, count):
    """Write the marginals of the first `count` lanes."""
    work, sequences, lengths = lanes.work, lanes.sequences, lanes.lengths
    stride, num_labels = lanes.stride, lanes.num_labels
    for begin in range(0, lengths[LANES - 1], _PORTION):
        for lane in range(count):
            stop = min(begin + _PORTION, lengths[lane]) * num_labels
            first, at = sequences[lane] * stride * num_labels, place + lane
            for i in range(begin * num_labels, stop):
                values[first + i] = min(max(work[at + i * LANES], 0.0), 1.0)
