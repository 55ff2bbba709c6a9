"""Messages beside the bounds of cores, handed out as the passes come by."""

from __future__ import annotations

import math

from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper
from flash_semicrf.streaming.cpu.vector import fill

__all__ = ["hand_alpha", "hand_beta", "note_handed"]


@helper
def note_handed(lanes, batch):
    """Note the boundaries, as the lanes have them, at which one of them hands out messages."""
    fill(lanes.handed, 0, lanes.handed.shape[0], False)
    for lane in range(LANES):
        b, length = lanes.sequences[lane], lanes.lengths[lane]
        for side in range(2):
            bound = batch.core[b, side]
            for t in range(max(0, bound - lanes.longest), min(length, bound + lanes.longest) + 1):
                lanes.handed[length - t if batch.mirrored else t] = True


@helper
def hand_alpha(lanes, row, boundary, batch, peak, messages):
    """Hand out the messages in a row, alpha of a boundary, where it is before one of a core's."""
    work, at, longest = lanes.work, lanes.at, lanes.longest
    for lane in range(LANES):
        b, taken_out = lanes.sequences[lane], work[at.offsets + boundary * LANES + lane]
        t = boundary
        if batch.mirrored:
            t = lanes.lengths[lane] - boundary
            taken_out = work[at.offset + lane] - taken_out
        for side in range(2):
            apart = batch.core[b, side] - t
            if 0 <= apart < longest and 0 < t <= lanes.lengths[lane]:
                k = longest - 1 - apart
                level = work[at.scale + lane] * math.log(2.0) + taken_out + peak
                messages.alpha_level[b, side, k] = level
                for c in range(lanes.num_labels):
                    messages.alpha[b, side, k, c] = work[row + c * LANES + lane]


@helper
def hand_beta(lanes, boundary, core, peak, messages):
    """Hand out what comes in, beta of a boundary, where it is behind one of a core's."""
    work, at = lanes.work, lanes.at
    for lane in range(LANES):
        b, taken_out = lanes.sequences[lane], work[at.offset + lane]
        taken_out -= work[at.offsets + boundary * LANES + lane]
        for side in range(2):
            k = boundary - core[b, side]
            if 0 <= k < lanes.longest and 0 < boundary < lanes.lengths[lane]:
                level = work[at.scale + lane] * math.log(2.0) + taken_out + peak
                messages.beta_level[b, side, k] = level
                for c in range(lanes.num_labels):
                    messages.beta[b, side, k, c] = work[at.incoming + c * LANES + lane]
