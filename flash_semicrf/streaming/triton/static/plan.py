"""Layout of the passes of a problem, and of the memory that each of their programs works in."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.records import power_of_two_above

__all__ = [
    "PART",
    "SPAN",
    "Done",
    "Part",
    "Plan",
    "Workspace",
    "is_done",
    "plan_of",
    "steps_of_halves",
    "workspace_at",
]

SPAN = 32
"""Positions between the running scores that the passes leave for the gradients."""

PART = 128
"""Steps of a part of a pass whose far window is summed in parallel beforehand."""

_LONG_WINDOW = 40
"""Blocks in a window from which it pays to run a pass in parts."""

_SHORTEST = 128
"""Positions below which the launches that join two halves take longer than half a pass."""

_SEQUENCES = 128
"""Sequences of which a device runs two halves as fast as one."""

_TERMS = 1 << 16
"""Twice the terms of a join, for each position, that take half of the time that halves save."""


class Workspace(NamedTuple):
    """Beginnings of the parts of a program's workspace, float64.

    A ring of blocks of R sources, scaled, with their rates; in the log passes also the sources as
    they are, raw, with their offsets, and the running score at each block.
    """

    sources: Tensor  # (ring, R, CP)
    rates: Tensor  # (ring, CP)
    state: Tensor  # (5, CP), between two blocks
    longer: Tensor  # (3, CP); in the max pass (ring, CP), or nothing without a tail
    scratch: Tensor  # (CP,); this and what follows up to `older` not in the max pass
    final: Tensor  # (2, CP): last message and its offset
    prefix: Tensor  # (ring, CP)
    raw: Tensor  # (ring, R, CP)
    raw_offset: Tensor  # (ring, R)
    older: Tensor  # (blocks of a part, R + 1, CP), by `far_kernel`


@triton.jit
def workspace_at(start, ring, MAX: tl.constexpr, HAS_TAIL: tl.constexpr, CP, R):
    """Parts of the workspace that begins at `start`, a pointer, or on the host a number."""
    rates = start + ring * R * CP
    state = rates + ring * CP
    longer = state + 5 * CP
    scratch = longer + 3 * CP
    final = scratch + CP
    prefix = final + 2 * CP
    raw = prefix + ring * CP
    raw_offset = raw + ring * R * CP
    older = raw_offset + ring * R
    if MAX:
        older = longer
        if HAS_TAIL:
            older = longer + ring * CP
    return Workspace(start, rates, state, longer, scratch, final, prefix, raw, raw_offset, older)


@triton.jit
def steps_of_halves(length, R):
    """Steps of both halves of a sequence: whole blocks of R from the left, the rest from the right.

    Numbers of a kernel or of the host.
    """
    left = length // (2 * R) * R
    return left, length - left


class Part(NamedTuple):
    """Steps of one launch of a pass, and the sizes of its ring."""

    begin: int
    end: int
    blocks_back: int
    ring: int
    stride: int  # elements of the workspace of a program
    unit: int = 1
    always_log: int = 0  # for tests


class Done(NamedTuple):
    """Passes whose results are certain already: those in float32."""

    flags: Tensor  # (directions, B) int32: 1 for these
    directions: int


@triton.jit
def is_done(done, b, batch):
    """Whether all passes over sequence b of a batch are done; never where `done` is None."""
    found = b < 0
    if done is not None:
        other = (done.directions - 1) * batch
        found = (tl.load(done.flags + b) == 1) & (tl.load(done.flags + other + b) == 1)
    return found


class Plan(NamedTuple):
    """How the passes of a problem are laid out.

    Attributes
    ----------
    labels : int
        C padded to a power of two.
    rows : int
        Steps of a block, R.
    blocks_back : int
        Earlier blocks whose sources a block reads.
    warps : int
        Warps that the labels take.
    groups : int
        Groups of as many warps that share the earlier blocks. More than one slows the steps down;
        the max pass gains by it, the others do not.
    in_parts : bool
        The pass comes in several launches, each after one for its far window.
    has_tail : bool
        There are durations above K.
    """

    labels: int
    rows: int
    blocks_back: int
    warps: int
    groups: int
    in_parts: bool
    has_tail: bool

    @property
    def ring(self) -> int:
        """Blocks of sources that are kept."""
        return self.blocks_back + 1

    @property
    def blocks_of_part(self) -> int:
        """Blocks of a part of a pass."""
        return PART // self.rows

    @property
    def options(self) -> dict[str, int]:
        """Constants and warps of a pass."""
        constants = {"CP": self.labels, "R": self.rows, "G": self.groups}
        return {"PARTS": self.in_parts, **constants, "num_warps": self.warps * self.groups}

    @property
    def far_options(self) -> dict[str, int]:
        """Constants and warps of the kernel that sums the far window of a part."""
        groups = min(4, 8 // self.warps)
        constants = {"CP": self.labels, "R": self.rows, "G": groups}
        return {**constants, "num_warps": groups * self.warps}

    def pays_in_halves(self, B: int, T: int, K: int) -> bool:
        """Whether log Z of B sequences of T positions comes sooner from two halves."""
        window = min(K, T // 2)
        terms = B * window * window * self.labels
        short = T < _SHORTEST or B > _SEQUENCES
        return not (short or self.has_tail) and terms <= _TERMS * T

    def longest_half(self, T: int) -> int:
        """Most steps that `steps_of_halves` gives a half of up to T positions."""
        return min(T, T // 2 + self.rows)

    def workspace(self, maximum: bool) -> int:
        """float64 elements that one program needs."""
        parts = workspace_at.fn(0, self.ring, maximum, self.has_tail, self.labels, self.rows)
        older = self.blocks_of_part * (self.rows + 1) * self.labels
        return parts.older + (older if self.in_parts else 0)

    def parts(self, T: int, maximum: bool = False, always_log: bool = False) -> list[Part]:
        """The launches that make up a pass over T positions."""
        steps = PART if self.in_parts else T
        sizes = (self.blocks_back, self.ring, self.workspace(maximum), 1, int(always_log))
        return [Part(begin, min(begin + steps, T), *sizes) for begin in range(0, T, steps)]


def plan_of(
    potentials: Potentials, decode: bool = False, rows: int | None = None, groups: int | None = None
) -> Plan:
    """Launch parameters by the numbers of labels and durations; the latter two are for tests."""
    labels = max(4, power_of_two_above(potentials.num_labels))
    if rows is None:
        rows = 8 if labels <= 32 else 4
    blocks_back = -(-(potentials.max_duration - 1) // rows)
    warps = {64: 2, 128: 8}.get(labels, 1)
    in_parts = groups is None and blocks_back >= _LONG_WINDOW
    if groups is None:
        groups = 2 if decode and 6 <= blocks_back < _LONG_WINDOW and warps == 1 else 1
    has_tail = potentials.duration_tail is not None
    return Plan(labels, rows, blocks_back, warps, groups, in_parts, has_tail)
