"""Sources that a pass keeps in its ring, as logarithms."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import allowed, decode_log, settled

__all__ = ["source_logs"]


@triton.jit
def source_logs(work, score_ptr, slope, first, ring, inside, direction, label, C, CP, R):
    """Logarithms of the R sources from step `first` on, less the running score; (R, CP).

    The raw sources are relative to an offset, or, where that is NaN, in logarithms less the running
    score.

    Parameters
    ----------
    work : Workspace
    score_ptr
        Row of the pass's first position; the others follow in `direction`.
    slope : Tensor of shape (1, CP)
        What every score has in addition.
    first : int
        A multiple of R, at least 0.
    inside : bool Tensor of shape (R, CP) or (1, CP)
        Where there are scores.
    label : Tensor of shape (CP,)
    """
    slot = first // R % ring
    row = tl.arange(0, R)[:, None]
    place = (first + row) * direction * C + label[None, :]
    x = tl.load(score_ptr + place, mask=inside, other=float("-inf"))
    x = settled(x, tl.max(x, 1)[:, None])
    x = tl.where(allowed(x), x + slope, 0.0)  # no linear block has deep ones
    before = tl.load(work.prefix + slot * CP + label)[None, :] + (tl.cumsum(x, 0) - x)
    offset = tl.load(work.raw_offset + slot * R + row)
    source = tl.load(work.raw + (slot * R + row) * CP + label[None, :])
    return tl.where(offset == offset, decode_log(source) + (offset - before), source)
