"""Passes over vectors of many millions of variables, each read once, on all threads.

Sums are taken in blocks of a fixed size, in the dtype of the vectors within a block and in float64
over the blocks in their order: they do not depend on the number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import Kernel, kernel_of_loops
from flash_semicrf.streaming.cpu.tasks import take

__all__ = ["combine", "largest", "penalised", "products", "scaled"]

_BLOCK = 4096
_COST = 40_000.0  # of a block; see `flash_semicrf.streaming.cpu.threads.position_cost`

_reordering = partial(kernel_of_loops, fastmath={"contract", "reassoc", "nsz"})


def _run(function: Kernel, count: int, num_sums: int, *arguments: Any) -> np.ndarray:
    """Call ``function(queue, sums, *arguments)`` on all blocks; return the sums over them."""
    blocks = np.arange(-(-count // _BLOCK))
    sums = np.zeros((len(blocks), num_sums))
    threads.run(function, blocks, np.full(len(blocks), _COST), (sums, *arguments))
    return sums.sum(0)


# Loops run over slices from 0 on: an index that might be negative would keep them from vectors.


@_reordering
def _products_kernel(queue, sums, new_x, x, new_gradient, gradient, slope, steps, changes, rows):
    memory, size = steps.shape
    block = take(queue)
    while block >= 0:
        part = slice(block * _BLOCK, min(block * _BLOCK + _BLOCK, size))
        step, change, now = steps[rows[-1], part], changes[rows[-1], part], slope[part]
        one, two = new_x[part], x[part]
        for i in range(len(step)):
            step[i] = one[i] - two[i]
        one, two = new_gradient[part], gradient[part]
        for i in range(len(step)):
            change[i] = one[i] - two[i]
        zero = step[0] * 0
        for r in rows:
            old = steps[r, part]
            a = b = zero
            for i in range(len(old)):
                a += old[i] * change[i]
                b += old[i] * now[i]
            sums[block, r] = a
            sums[block, memory + r] = b
            old = changes[r, part]
            a = b = c = zero
            for i in range(len(old)):
                a += old[i] * change[i]
                b += old[i] * now[i]
                c += old[i] * step[i]
            sums[block, 2 * memory + r] = a
            sums[block, 3 * memory + r] = b
            sums[block, 4 * memory + r] = c
        block = take(queue)


def products(
    new_x: np.ndarray,
    x: np.ndarray,
    new_gradient: np.ndarray,
    gradient: np.ndarray,
    slope: np.ndarray,
    steps: np.ndarray,
    changes: np.ndarray,
    rows: list[int],
) -> np.ndarray:
    """Write the last step and change of the gradient to a history; return all products.

    Parameters
    ----------
    new_x, x, new_gradient, gradient, slope : arrays of shape (n,)
    steps, changes : arrays of shape (memory, n)
        S and Y. Their row ``rows[-1]`` becomes ``new_x - x`` and ``new_gradient - gradient``.
    rows : list of int
        The rows in use.

    Returns
    -------
    float64 array of shape (5, memory)
        S change, S slope, Y change, Y slope and Y step; 0 in rows that are not in use.
    """
    memory, count = steps.shape
    given = (new_x, x, new_gradient, gradient, slope, steps, changes, np.array(rows))
    return _run(_products_kernel, count, 5 * memory, *given).reshape(5, memory)


@_reordering
def _combine_kernel(queue, sums, slope, steps, changes, rows, factor, coefficients, direction):
    block = take(queue)
    while block >= 0:
        part = slice(block * _BLOCK, min(block * _BLOCK + _BLOCK, slope.shape[0]))
        out, now = direction[part], slope[part]
        for i in range(len(out)):
            out[i] = factor * now[i]
        for r in rows:
            step, change = steps[r, part], changes[r, part]
            a, b = coefficients[0, r], coefficients[1, r]
            for i in range(len(out)):
                out[i] += a * step[i] + b * change[i]
        block = take(queue)


def combine(
    slope: np.ndarray,
    steps: np.ndarray,
    changes: np.ndarray,
    rows: list[int],
    factor: float,
    coefficients: np.ndarray,
) -> np.ndarray:
    """``factor * slope + coefficients[0] @ steps + coefficients[1] @ changes``, over some rows."""
    direction = np.empty_like(slope)
    kind = slope.dtype.type
    last = (kind(factor), coefficients.astype(kind), direction)
    _run(_combine_kernel, len(slope), 0, slope, steps, changes, np.array(rows), *last)
    return direction


@_reordering
def _scaled_kernel(queue, sums, x, scale, out):
    block = take(queue)
    while block >= 0:
        part = slice(block * _BLOCK, min(block * _BLOCK + _BLOCK, x.shape[0]))
        one, two, to = x[part], scale[part], out[part]
        for i in range(len(to)):
            to[i] = one[i] * two[i]
        block = take(queue)


def scaled(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``x * scale``."""
    out = np.empty_like(x)
    _run(_scaled_kernel, len(x), 0, x, scale, out)
    return out


@_reordering
def _penalised_kernel(queue, sums, gradient, parameters, scale, weights, factor):
    block = take(queue)
    while block >= 0:
        part = slice(block * _BLOCK, min(block * _BLOCK + _BLOCK, gradient.shape[0]))
        slope, value, unit, weight = gradient[part], parameters[part], scale[part], weights[part]
        total = slope[0] * 0
        for i in range(len(slope)):
            decay = weight[i] * value[i]
            total += decay * value[i]
            slope[i] = (slope[i] * factor + decay) * unit[i]
        sums[block, 0] = total
        block = take(queue)


def penalised(
    gradient: np.ndarray,
    parameters: np.ndarray,
    scale: np.ndarray,
    weights: np.ndarray,
    factor: float,
) -> float:
    """Turn a gradient, in place, into that of variables, with half a weighted sum of squares.

    ``(factor * gradient + weights * parameters) * scale``; returns ``weights @ parameters**2``.
    """
    given = (gradient, parameters, scale, weights, gradient.dtype.type(factor))
    return float(_run(_penalised_kernel, len(gradient), 1, *given)[0])


def largest(x: np.ndarray) -> float:
    """Largest absolute value."""
    return float(max(x.max(), -x.min()))
