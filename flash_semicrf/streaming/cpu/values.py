"""Whether all values of a problem are usual ones, at the cost of reading them once.

`flash_semicrf.validation` asks this first; where the answer is no it looks for the entry to name.
"""

from __future__ import annotations

from flash_semicrf.potentials import NEG_INF, Potentials

__all__ = ["values_are_allowed"]


def values_are_allowed(potentials: Potentials) -> bool:
    """Whether lengths are in [1, T] and entries between -1e38 and 1e38; the form is checked.

    False, too, where it takes a second look: for entries that forbid, whose gradient is to be 0,
    and padding that is not finite.
    """
    lengths = potentials.lengths.numpy()
    if not (lengths.min() >= 1 and lengths.max() <= potentials.num_positions):
        return False
    for name, value in potentials.parameters().items():
        array = value.detach().numpy()
        low, high = potentials.score_range if name == "scores" else (array.min(), array.max())
        if not (low > array.dtype.type(NEG_INF) and high < -NEG_INF):
            return False
    return True
