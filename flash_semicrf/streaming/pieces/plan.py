"""Whether and how to cut: a pure function of the sizes of a problem and of its device."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["SHORTEST", "Cut", "Slots", "cuts_of", "within_memory"]

SHORTEST = 1000
"""Positions below which nothing is cut on any device."""

_SHORT, _LONG = (3, 256), (32, 2048)
"""Warm-ups of the first and the second attempt, in K, and in positions at least. Most models forget
within 2 K, weak ones in up to 30 K."""

_SPAN = 128
"""Positions in multiples of which pieces begin; the gradients of shared parameters are summed in
spans."""


class Slots(NamedTuple):
    """What a device does at once.

    Attributes
    ----------
    passes : int
        Passes that run side by side without slowing each other down.
    overhead : int
        Steps of a pass that take as long as cutting, comparing and putting together.
    patient : bool
        One pass more costs as much as the passes save: attempts that may fail do not pay.
    together : int
        Pieces that are done together, at the price of one: their number is a multiple.
    least : int
        Least length of a piece, in warm-ups.
    slower : int
        Steps of a sequence alone that a step of its pieces takes as long as.
    """

    passes: int
    overhead: int
    patient: bool
    together: int = 1
    least: int = 2
    slower: int = 1


_SUMMED = 2**25
"""float64 numbers that all passes together may leave to be summed."""


def within_memory(slots: Slots, summed: int) -> Slots:
    """Fewer passes, where each of them leaves so many numbers that they would take much memory.

    Examples
    --------
    >>> within_memory(Slots(528, 1500, False), 100 * 24 * 24).passes
    528
    >>> within_memory(Slots(528, 1500, False), 1000 * 64 * 64).passes
    8
    """
    return slots._replace(passes=max(1, min(slots.passes, _SUMMED // summed)))


class Cut(NamedTuple):
    """A way to cut sequences.

    Attributes
    ----------
    length : int
        Positions of a piece; a multiple of `span`, as `warm`.
    warm : int
        Positions before and after it that its passes take in.
    span : int
    """

    length: int
    warm: int
    span: int

    @property
    def common(self) -> int:
        """Positions in multiples of which pieces begin and end in their rows."""
        return math.gcd(self.length, self.warm)


def cuts_of(
    batch_size: int, num_positions: int, max_duration: int, directions: int, slots: Slots
) -> tuple[Cut, ...]:
    """Attempts to make, one after the other, before sequences are done as a whole.

    Parameters
    ----------
    batch_size, num_positions, max_duration : int
        B, T and K.
    directions : int
        Passes over each piece: 1 for log Z and decoding, 2 for gradients.
    slots : Slots

    Returns
    -------
    tuple of Cut
        Empty where it does not pay: sequences are short, or enough of them to fill the device.

    Examples
    --------
    >>> cuts_of(1, 1_000_000, 100, 2, Slots(500, 1500, False))[0]
    Cut(length=4096, warm=384, span=128)
    >>> cuts_of(64, 200, 100, 2, Slots(500, 1500, False))
    ()
    """
    span = _multiple(max(_SPAN, max_duration), 32)
    pieces = slots.passes // directions
    cuts = []
    for times, least in (_LONG,) if slots.patient else (_SHORT, _LONG):
        warm = _multiple(max(times * max_duration, least), span)
        total = batch_size * num_positions
        even = -(-total // max(1, pieces))
        length = even if slots.patient else max(even, slots.least * warm)
        if slots.together > 1:
            groups = max(1, -(-total // length) // slots.together)
            length = -(-total // (groups * slots.together))
        length = _multiple(length, span)
        steps = slots.slower * (length + (1 if directions == 1 else 2) * warm)
        # Fewer pieces than make up a group would be mostly warm-up.
        worth = slots.together == 1 or 2 * length >= slots.least * warm
        if worth and batch_size < pieces and 3 * (steps + slots.overhead) <= 2 * num_positions:
            cuts.append(Cut(length, warm, span))
    return tuple(cuts)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
