"""Whether all values of a problem are usual ones, at the cost of reading them once.

`flash_semicrf.problem.validation` calls this first, and searches for the entry to name only where
it returns False.
"""

from __future__ import annotations

from flash_semicrf.problem.potentials import Potentials

__all__ = ["values_are_allowed"]

_LARGE = 9.9e37  # below 1e38 in any dtype that has been cast to float32


def values_are_allowed(potentials: Potentials) -> bool:
    """Whether lengths are in [1, T] and entries between -9.9e37 and 9.9e37.

    False, too, where a second look is needed: for entries that forbid, whose gradient is to be 0,
    and padding that is not finite.
    """
    lengths = potentials.lengths.numpy()
    if not (lengths.min() >= 1 and lengths.max() <= potentials.num_positions):
        return False
    for name, value in potentials.parameters().items():
        array = value.detach().numpy()
        low, high = potentials.score_range if name == "scores" else (array.min(), array.max())
        if not (low > -_LARGE and high < _LARGE):
            return False
    return True
