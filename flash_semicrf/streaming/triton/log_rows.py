"""Log-domain building blocks of the kernels that follow durations one by one."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import exp_wide, wide

__all__ = ["deep_content", "lengthen", "load_row", "load_transition", "log_add", "sum_over"]


@triton.jit
def load_row(row_ptr, label, C):
    return wide(tl.load(row_ptr + label, mask=label < C, other=float("-inf")))


@triton.jit
def deep_content(deep_ptr, s, t, label, C):
    """Sum of the deep scores of positions s up to t."""
    inside = label < C
    after = tl.load(deep_ptr + t * C + label, mask=inside, other=0.0)
    return after - tl.load(deep_ptr + s * C + label, mask=inside, other=0.0)


@triton.jit
def load_transition(transition_ptr, k, target, source, C):
    """A_k as it broadcasts over `target` and `source` labels; -inf outside."""
    place = ((k - 1) * C + source) * C + target
    return wide(
        tl.load(transition_ptr + place, mask=(source < C) & (target < C), other=float("-inf"))
    )


@triton.jit
def sum_over(x, MAX: tl.constexpr):
    """Log-sum-exp, or maximum, over the second axis."""
    found = tl.max(x, 1)
    if not MAX:
        safe = tl.where(found > float("-inf"), found, 0.0)
        found = safe + tl.log(tl.sum(exp_wide(x - safe[:, None]), 1))
    return found


@triton.jit
def log_add(total, x, MAX: tl.constexpr = False):
    """Log of exp(total) + exp(x), or their maximum."""
    top = tl.maximum(total, x)
    if not MAX:
        safe = tl.where(top > float("-inf"), top, 0.0)
        top = safe + tl.log(exp_wide(total - safe) + exp_wide(x - safe))
    return top


@triton.jit
def lengthen(x, tail, deep_ptr, born_ptr, t, label, C):
    """x with position t - 1 as one more beyond the K-th of its segment; both float64 (CP,)."""
    born = tl.load(born_ptr + t * C + label, mask=label < C, other=0)
    x += tail + deep_content(deep_ptr, t - 1, t, label, C)
    return tl.where(born < t, x, float("-inf"))
