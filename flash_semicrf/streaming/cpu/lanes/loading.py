"""Rows of eight sequences put side by side, and taken apart again."""

from __future__ import annotations

from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper

__all__ = ["load_lanes", "store_lanes"]


@helper
def load_lanes(lanes, place, values, mirrored, begin, stop):
    """Put some positions of eight sequences side by side, or from their ends; zeros after them."""
    work, num_labels = lanes.work, lanes.num_labels
    for lane in range(LANES):
        first, length = lanes.sequences[lane] * lanes.stride, lanes.lengths[lane]
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
def store_lanes(lanes, place, values, count, begin, stop):
    """Write marginals of the first `count` lanes, those of position `begin` at `place`."""
    work, num_labels = lanes.work, lanes.num_labels
    for lane in range(count):
        size = (min(stop, lanes.lengths[lane]) - begin) * num_labels
        first, at = (lanes.sequences[lane] * lanes.stride + begin) * num_labels, place + lane
        for i in range(size):
            values[first + i] = min(max(work[at + i * LANES], 0.0), 1.0)
