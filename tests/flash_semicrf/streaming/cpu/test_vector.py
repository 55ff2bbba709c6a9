"""The vector building blocks against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numba import config

from flash_semicrf.streaming.cpu import parts
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_row,
    exp_sum,
    exp_sums,
    log_row,
    max_sum,
    max_tile,
    multiply_tile,
    multiply_tile8,
)

pytestmark = pytest.mark.kernels

# Intrinsics are called from compiled code only; compiled as kernels are, so that what is tested
# here is what runs there.
_compile = parts.whole


@_compile
def run_exp(x, out, offset, count):
    exp_row(x, offset, out, offset, count)


@_compile
def run_log(x, out, offset, count):
    log_row(x, offset, out, offset, count)


@_compile
def run_multiply(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at):
    multiply_tile(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at)


@_compile
def run_multiply8(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at):
    multiply_tile8(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at)


@_compile
def run_max(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at):
    max_tile(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at)


@_compile
def run_max_sum(x, x_at, y, y_at, count):
    return max_sum(x, x_at, y, y_at, count)


@_compile
def run_exp_sum(x, x_at, y, y_at, top, count):
    return exp_sum(x, x_at, y, y_at, top, count)


@_compile
def run_exp_sums(x, x_at, y, y_at, y_stride, count, tops, out, at):
    exp_sums(x, x_at, y, y_at, y_stride, count, tops, out, at)


# Of x86-64, by the name that numba compiles for: registers that the code may not use.
TOO_WIDE = {"generic": ("ymm", "zmm"), "haswell": ("zmm",)}


# A name alone keeps the features of this machine.
OF_THE_NAME = config.CPU_NAME in TOO_WIDE and config.CPU_FEATURES == ""


@pytest.mark.skipif(not OF_THE_NAME, reason="compiled with the features of this machine")
def test_vectors_are_those_of_the_processor_named():
    x = np.ones(TILE)
    run_exp(x, x, 0, TILE)
    (assembly,) = run_exp.inspect_asm().values()
    assert "xmm" in assembly
    assert not any(name in assembly for name in TOO_WIDE[config.CPU_NAME])


def ulps(actual: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of `exact`, a long double."""
    spacing = np.spacing(np.abs(exact).astype(np.float64))
    return float(np.max(np.abs(actual.astype(exact.dtype) - exact) / spacing))


def test_exp_row_accuracy():
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.uniform(-649, 700, 40000), draw.normal(0, 1, 40000)])
    out = np.empty_like(x)
    run_exp(x, out, 0, len(x))
    assert ulps(out, np.exp(x.astype(np.longdouble))) < 2.0


def test_exp_row_is_exact_at_zero_and_zero_below_the_floor():
    x = np.array([0.0, -0.0, -650.0, -650.5, -1e5, -1e38, -np.inf, -649.9])
    out = np.full(LANES, np.nan)
    run_exp(x, out, 0, LANES)
    assert out[:2].tolist() == [1.0, 1.0]
    assert out[2:7].tolist() == [0.0] * 5
    # The product of two of the smallest that are kept is zero, of one and CERTAIN's root it is not.
    assert 0.0 < out[7] < 1e-282


def test_log_row_accuracy():
    draw = np.random.default_rng(1)
    x = np.concatenate([np.exp(draw.uniform(-700, 700, 40000)), np.exp(draw.normal(0, 1, 40000))])
    out = np.empty_like(x)
    run_log(x, out, 0, len(x))
    exact = np.log(x.astype(np.longdouble))
    # Messages are sums of logarithms: small ones count by their absolute error.
    assert np.max(np.abs(out - exact) / np.maximum(np.abs(exact), 1.0)) < 4e-16


def test_log_row_of_powers_of_two_and_one():
    x = np.ldexp(1.0, np.array([0, 1, -1, 10, -1000, 1000, 52, -52]))
    out = np.empty(LANES)
    run_log(x, out, 0, LANES)
    assert out[0] == 0.0
    np.testing.assert_allclose(out, np.log(x), rtol=3e-16)


@pytest.mark.parametrize("run", [run_exp, run_log])
def test_rows_touch_only_what_they_are_given(run):
    x = np.full(4 * LANES, 2.0)
    out = np.full(4 * LANES, -7.0)
    run(x, out, LANES, 2 * LANES)
    assert (out[:LANES] == -7.0).all() and (out[3 * LANES :] == -7.0).all()
    assert (out[LANES : 3 * LANES] > 0.0).all()
    run(x, out, 0, 0)
    assert (out[:LANES] == -7.0).all()


def test_rows_work_in_place():
    x = np.linspace(0.5, 2.0, 2 * LANES)
    expected = np.log(x)
    run_log(x, x, 0, len(x))
    np.testing.assert_allclose(x, expected, atol=4e-16)


LAYOUTS = {
    # name: (x stride, y stride): as the window sum, a push, a matrix product and its gradient
    "window": (1, -1),
    "correlation": (1, 1),
    "product": (1, 24),
    "outer": (24, 24),
    "push": (1, 0),
    "still": (0, -1),
}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 16, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("run", "width"), [(run_multiply, TILE), (run_multiply8, LANES), (run_max, TILE)]
)
def test_tiles(run, width, layout, count):
    x_stride, y_stride = LAYOUTS[layout]
    draw = np.random.default_rng(count)
    # As if each were the middle of a buffer, so that negative strides stay inside.
    x, y = draw.normal(size=(2, 4000))
    x_at, y_at, out_at = 1501, 2003, 5
    out = draw.normal(size=40)
    expected = out.copy()
    for j in range(width):
        pairs = [(x[x_at + i * x_stride], y[y_at + i * y_stride + j]) for i in range(count)]
        if run is run_max:
            expected[out_at + j] = max([out[out_at + j], *(a + b for a, b in pairs)])
        else:
            expected[out_at + j] += sum(a * b for a, b in pairs)
    run(x, x_at, x_stride, y, y_at, y_stride, count, out, out_at)
    if run is run_max:
        np.testing.assert_array_equal(out, expected)  # sums of two and maxima are exact
    else:
        np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)


def test_max_tile_keeps_minus_infinity():
    out = np.full(TILE, -np.inf)
    run_max(np.full(3, -np.inf), 0, 1, np.zeros(TILE + 3), 0, 1, 3, out, 0)
    assert (out == -np.inf).all()


@pytest.mark.parametrize("count", [0, 8, 16, 24, 32, 40, 64, 72, 1000])
@pytest.mark.parametrize("spread", [1.0, 30.0, 3000.0])
def test_sums_of_logarithms(count, spread):
    draw = np.random.default_rng(count)
    x, y = spread * draw.standard_normal((2, count + 8))
    x[3::5] = -np.inf
    both = x[5 : 5 + count] + y[2 : 2 + count]
    top = run_max_sum(x, 5, y, 2, count)
    assert top == both.max(initial=-np.inf)
    if count:
        expected = np.exp(both - top).sum()
        assert run_exp_sum(x, 5, y, 2, top, count) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("place", range(40))
def test_sums_of_logarithms_miss_no_lane(place):
    x, y = np.full(40, -50.0), np.zeros(40)
    x[place] = 3.0
    assert run_max_sum(x, 0, y, 0, 40) == 3.0
    assert run_exp_sum(x, 0, y, 0, 3.0, 40) == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("spread", [1.0, 3000.0])
def test_columns_of_logarithms(spread):
    draw = np.random.default_rng(5)
    x, y = spread * draw.standard_normal(9), spread * draw.standard_normal((7, 24))
    y[:, 10] = -np.inf
    y[:3, 11] = -np.inf
    both = x[2:, None] + y[:, 8:16]
    tops, out = np.zeros(24), np.full(24, -7.0)
    tops[8:16] = np.where(np.isfinite(both.max(0)), both.max(0), 0.0)
    run_exp_sums(x, 2, y.ravel(), 8, 24, 7, tops, out, 8)
    np.testing.assert_allclose(out[8:16], np.exp(both - tops[8:16]).sum(0), rtol=1e-14)
    assert (out[:8] == -7.0).all() and (out[16:] == -7.0).all()
