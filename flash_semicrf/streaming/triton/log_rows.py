"""Log-domain building blocks of the kernels that follow durations one by one."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import exp_wide, finite, wide

__all__ = [
    "deep_content",
    "either",
    "feasible",
    "lengthen",
    "load_finite",
    "load_row",
    "load_transition",
    "log_add",
    "mean_of",
    "sum_over",
    "uncut",
]


@triton.jit
def load_row(row_ptr, label, C):
    """Row in float64; -inf for what forbids and for padding."""
    return wide(tl.load(row_ptr + label, mask=label < C, other=float("-inf")))


@triton.jit
def load_finite(row_ptr, label, C):
    """Row of finite numbers; 0 for padding."""
    return tl.load(row_ptr + label, mask=label < C, other=0.0)


@triton.jit
def load_transition(transition_ptr, k, target, source, C):
    """A_k as it broadcasts over `target` and `source` labels; -inf outside."""
    place = ((k - 1) * C + source) * C + target
    return wide(
        tl.load(transition_ptr + place, mask=(source < C) & (target < C), other=float("-inf"))
    )


@triton.jit
def feasible(sizes, log_z_ptr, b):
    """Length and log Z of a sequence, both 0 where nothing is feasible."""
    log_z = tl.load(log_z_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(sizes.lengths + b).to(tl.int32), 0)
    return length, tl.where(length > 0, log_z, 0.0)


@triton.jit
def deep_content(deep_ptr, s, t, label, C):
    """Sum of the deep scores of positions s up to t."""
    return load_finite(deep_ptr + t * C, label, C) - load_finite(deep_ptr + s * C, label, C)


@triton.jit
def uncut(x, born_ptr, s, t, label, C):
    """x where no forbidden position cuts [s, t), else -inf."""
    born = tl.load(born_ptr + t * C + label, mask=label < C, other=0)
    return tl.where(s >= born, x, float("-inf"))


@triton.jit
def sum_over(x, MAX):
    """Log-sum-exp, or maximum, over the second axis."""
    found = tl.max(x, 1)
    if not MAX:
        safe = finite(found)
        found = safe + tl.log(tl.sum(exp_wide(x - safe[:, None]), 1))
    return found


@triton.jit
def log_add(total, x, MAX: tl.constexpr = False):
    """Log of exp(total) + exp(x), or their maximum."""
    top = tl.maximum(total, x)
    if not MAX:
        safe = finite(top)
        top = safe + tl.log(exp_wide(total - safe) + exp_wide(x - safe))
    return top


@triton.jit
def mean_of(weighted, total):
    """Mean of a weighted sum, 0 where nothing has a weight."""
    return tl.where(total > 0, weighted / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def either(x, d, y, e):
    """Log of exp(x) + exp(y), and the mean of d and e by their shares; 0 where both are -inf."""
    top = finite(tl.maximum(x, y))
    weight = exp_wide(x - top)
    other = exp_wide(y - top)
    total = weight + other
    return top + tl.log(total), mean_of(weight * d + other * e, total)


@triton.jit
def lengthen(x, tail, prefixes, t, label, C):
    """x with position t - 1 as one more beyond the K-th of its segment; both float64 (CP,)."""
    x += tail + deep_content(prefixes.deep, t - 1, t, label, C)
    return uncut(x, prefixes.born, t - 1, t, label, C)
