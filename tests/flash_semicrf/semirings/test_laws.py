"""What makes a semiring: neutral elements, associativity, distributivity; and no NaN gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_semicrf import semirings
from flash_semicrf.semirings import (
    CrossEntropySemiring,
    EntropySemiring,
    KLDivergenceSemiring,
    KMaxSemiring,
    LogSemiring,
    MaxSemiring,
    Semiring,
    StdSemiring,
)
from flash_semicrf.semirings.base import as_semiring
from flash_semicrf.semirings.checkpoint import CheckpointSemiring, CheckpointShardSemiring
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.edge_paths import random_edges

SEMIRINGS = [
    LogSemiring(),
    MaxSemiring(),
    StdSemiring(),
    KMaxSemiring(1),
    KMaxSemiring(3),
    EntropySemiring(),
    CrossEntropySemiring(),
    KLDivergenceSemiring(),
    CheckpointSemiring(KMaxSemiring(2)),
    CheckpointShardSemiring(EntropySemiring, 7),
]

semiring_strategy = st.sampled_from(SEMIRINGS)
seed_strategy = st.integers(0, 999)


def potentials(semiring, *shape, seed, forbid=0.3):
    front = (2,) if semiring.num_potentials == 2 else ()
    x = random_edges(*front, *shape, seed=seed)
    dead = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < forbid
    x = x.masked_fill(dead, -math.inf)
    return x if semiring.log_domain else x.exp()


def values(semiring, *shape, seed):
    """Values of every form: sums of products of converted potentials."""
    x, y = (semiring.convert(potentials(semiring, *shape, 2, seed=s)) for s in (seed, seed + 1000))
    return semiring.sum(semiring.mul(x, y), -1)


def assert_same(semiring, a, b):
    """Equal values; what a value of weight zero holds besides does not matter."""
    if semiring.log_domain:
        absent = (a[0] == -math.inf) & (b[0] == -math.inf)
        zero = semiring.full(semiring.zero, tuple(absent.shape), a)
        a, b = torch.where(absent, zero, a), torch.where(absent, zero, b)
    assert_close(a, b)


@given(semiring=semiring_strategy, seed=seed_strategy)
def test_laws(semiring, seed):
    a, b, c = (values(semiring, 4, seed=seed + i) for i in (0, 1, 2))
    zero = semiring.full(semiring.zero, (4,), a)
    one = semiring.full(semiring.one, (4,), a)
    plus, mul = semiring.plus, semiring.mul
    pairs = [
        (plus(a, b), plus(b, a)),
        (plus(plus(a, b), c), plus(a, plus(b, c))),
        (plus(a, zero), a),
        (mul(mul(a, b), c), mul(a, mul(b, c))),
        (mul(a, one), a),
        (mul(one, a), a),
        (mul(a, zero), zero),
        (mul(zero, a), zero),
        (mul(a, plus(b, c)), plus(mul(a, b), mul(a, c))),
        (mul(plus(a, b), c), plus(mul(a, c), mul(b, c))),
    ]
    for left, right in pairs:
        assert_same(semiring, left, right)


@given(semiring=semiring_strategy, seed=seed_strategy)
def test_sums_and_products_of_many(semiring, seed):
    x = values(semiring, 3, 5, seed=seed)
    total, product = x[..., 0], x[..., 0]
    for i in range(1, 5):
        total, product = semiring.plus(total, x[..., i]), semiring.mul(product, x[..., i])
    assert_same(semiring, semiring.sum(x, -1), total)
    assert_same(semiring, semiring.sum(x.transpose(-1, -2), -2), total)
    assert_same(semiring, semiring.prod(x), product)
    empty = semiring.prod(x[..., :0])
    assert_close(empty, semiring.full(semiring.one, (3,), x))


@given(semiring=semiring_strategy, seed=seed_strategy)
def test_matrix_products(semiring, seed):
    a, b = values(semiring, 5, 3, 4, seed=seed), values(semiring, 5, 4, 2, seed=seed + 1)
    product = semiring.matmul(a, b)
    for i in range(3):
        for j in range(2):
            expected = semiring.dot(a[..., i, :], b[..., :, j])
            assert_same(semiring, product[..., i, j], expected)


@pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("forbid", [0.0, 0.5, 1.0])
def test_gradients_are_never_nan(semiring, forbid):
    x = potentials(semiring, 6, 5, seed=4, forbid=forbid).requires_grad_()
    terms = semiring.mul(semiring.convert(x), semiring.convert(x.flip(-1)))
    answer = semiring.unconvert(semiring.sum(terms, -1))
    gradient = torch.autograd.grad(torch.where(answer.isfinite(), answer, 0.0).sum(), x)[0]
    assert gradient.isfinite().all()
    if semiring.log_domain:
        assert not gradient[x == -math.inf].any()


def test_values_far_below_the_others_underflow_without_nan():
    for semiring in (EntropySemiring(), KLDivergenceSemiring(), CrossEntropySemiring()):
        x = torch.tensor([0.0, -900.0, 0.0], dtype=torch.float64)
        x = (x.expand(2, 3) if semiring.num_potentials == 2 else x).clone().requires_grad_()
        answer = semiring.unconvert(semiring.sum(semiring.convert(x), -1))
        expected = 0.0 if isinstance(semiring, KLDivergenceSemiring) else math.log(2)
        assert_close(answer, torch.tensor(expected, dtype=torch.float64))
        assert torch.autograd.grad(answer, x)[0].isfinite().all()


def test_k_must_be_a_positive_integer():
    for bad in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="`k` must be an integer >= 1"):
            KMaxSemiring(bad)


def test_a_pair_of_potentials_need_not_be_stacked():
    pair = [torch.randn(3, 4), torch.randn(3, 4)]
    for semiring in (CrossEntropySemiring(), KLDivergenceSemiring()):
        expected = semiring.convert(torch.stack(pair))
        assert torch.equal(semiring.convert(pair), expected)
        assert torch.equal(semiring.convert(tuple(pair)), expected)


@pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: type(s).__name__)
def test_products_of_many_values_and_over_any_axis(semiring):
    x = values(semiring, 2, 3, seed=5)
    expected = semiring.mul(semiring.mul(x[..., 0], x[..., 1]), x[..., 2])
    assert_same(semiring, semiring.times(*x.unbind(-1)), expected)
    assert_same(semiring, semiring.prod(x.transpose(-1, -2), -2), expected)
    assert torch.equal(semiring.times(x), x)


@pytest.mark.parametrize(
    "semiring", [type(s) for s in SEMIRINGS if type(s).__init__ is object.__init__]
)
def test_methods_of_a_class_are_those_of_its_instance(semiring):
    made = semiring()
    a, b = values(made, 3, 3, seed=1), values(made, 3, 3, seed=2)
    for name in ("mul", "plus", "times", "dot", "matmul"):
        assert torch.equal(getattr(semiring, name)(a, b), getattr(made, name)(a, b))
    for name in ("sum", "prod", "unconvert"):
        assert torch.equal(getattr(semiring, name)(a), getattr(made, name)(a))
    potential = potentials(made, 3, seed=3)
    assert torch.equal(semiring.convert(potential), made.convert(potential))
    assert (semiring.zero, semiring.one, semiring.size) == (made.zero, made.one, made.size)


def test_semirings_of_numbers_have_numbers_for_neutral_elements():
    x = torch.randn(4)
    for semiring in (LogSemiring, MaxSemiring, StdSemiring):
        assert_close(semiring.plus(x, torch.full_like(x, semiring.zero)), x)
        assert_close(semiring.times(x, torch.full_like(x, semiring.one)), x)


def test_user_semirings_are_callable_on_the_class_too():
    class Doubled(LogSemiring):
        def mul(self, a, b):
            return 2 * super().mul(a, b)

    one = torch.ones(2)
    assert Doubled.mul(one, one).tolist() == Doubled().mul(one, one).tolist() == [4.0, 4.0]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        KMaxSemiring.sum(one)


def test_a_class_stands_for_its_instance():
    assert isinstance(as_semiring(LogSemiring), LogSemiring)
    semiring = KMaxSemiring(2)
    assert as_semiring(semiring) is semiring
    with pytest.raises(TypeError, match="`semiring` must be a Semiring or a subclass; got 3"):
        as_semiring(3)


def test_exports():
    assert semirings.__all__ == [
        "CrossEntropySemiring",
        "EntropySemiring",
        "KLDivergenceSemiring",
        "KMaxSemiring",
        "LogSemiring",
        "MaxSemiring",
        "Semiring",
        "StdSemiring",
    ]
    assert all(issubclass(getattr(semirings, name), Semiring) for name in semirings.__all__)
