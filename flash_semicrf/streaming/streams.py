"""Random numbers for sampling: streams that any backend can draw from, in any order.

Number n of a stream is a hash of its state and n (SplitMix, Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators", OOPSLA), so there is no state between draws. Every
(sequence, sample) has its own stream and increment. A sample therefore depends on the seed, the
index of its sequence in the batch and its own index, but not on threads or the number of samples.

All backends use the numbers of a sample alike: number 0 for the last label; then, from the end,
2i + 1 for the duration of segment i and 2i + 2 for the label before it. A draw is the first option
at which the cumulative probability exceeds the number, in the order of rising labels and durations;
with a duration tail, durations beyond K come after K.

These are plain functions of numpy integers; the kernels compile `uniform` from this source.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix", "streams", "uniform"]

_Integers: TypeAlias = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S1, _S2, _S4, _S11, _S27, _S30, _S31, _S56 = map(np.uint64, (1, 2, 4, 11, 27, 30, 31, 56))
_UNIT = 2.0**-53


def mix(z: _Integers) -> _Integers:
    """Hash of 64-bit integers: a bijection in which every output bit depends on every input bit."""
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    return z ^ (z >> _S31)


def uniform(state: _Integers, increment: _Integers, number: _Integers) -> NDArray[np.float64]:
    """Number `number` of a stream: a float64 in [0, 1), a multiple of 2^-53."""
    z = state + (number + _S1) * increment
    # `mix`, inlined: numba compiles this function alone.
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    share: NDArray[np.float64] = ((z ^ (z >> _S31)) >> _S11) * _UNIT
    return share


def streams(seed: int, num_samples: int, batch_size: int) -> _Integers:
    """State and increment of every stream.

    Parameters
    ----------
    seed : int
        Seed, modulo 2^64.
    num_samples, batch_size : int
        Numbers of samples per sequence and of sequences.

    Returns
    -------
    uint64 array of shape (2, num_samples, B)
    """
    start = np.array(seed % 2**64, dtype=np.uint64)
    sequence = np.arange(1, batch_size + 1, dtype=np.uint64)
    sample = np.arange(1, num_samples + 1, dtype=np.uint64)
    key = mix(mix(start[None]) + sequence * _GOLDEN)
    key = mix(key + sample[:, None] * _GOLDEN)
    increment = mix(key + _GOLDEN) | _S1
    # As in the paper: increments with few bit changes mix less well, and get more of them.
    regular = _count_bits(increment ^ (increment >> _S1)) < 24
    increment = np.where(regular, increment ^ np.uint64(0xAAAAAAAAAAAAAAAA), increment)
    return np.stack([mix(key), increment])


def _count_bits(x: _Integers) -> _Integers:
    """Number of ones of 64-bit integers (numpy has `bitwise_count` only from release 2.0)."""
    x = x - ((x >> _S1) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> _S2) & np.uint64(0x3333333333333333))
    x = (x + (x >> _S4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> _S56
