"""Duration distributions: formulas against scipy, numerics, fits to samples, the factory."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from flash_semicrf.duration import (
    DURATION_DISTRIBUTIONS,
    CallableDuration,
    DurationDistribution,
    GeometricDuration,
    LearnedDuration,
    NegativeBinomialDuration,
    PoissonDuration,
    UniformDuration,
    create_duration_distribution,
)
from flash_semicrf.testing import assert_close

PARAMETRIC = [GeometricDuration, NegativeBinomialDuration, PoissonDuration, UniformDuration]
K, C = 7, 3


def slopes(durations):
    return -durations[:, None].expand(len(durations), C)


def every_distribution(max_duration=K):
    for name, cls in DURATION_DISTRIBUTIONS.items():
        arguments = {"function": slopes} if name == "callable" else {}
        yield cls(max_duration, C, **arguments)


def truncated(log_pmf):
    """Normalise rows of log-probabilities over durations."""
    return torch.from_numpy(log_pmf - np.logaddexp.reduce(log_pmf, axis=0))


# Formulas


@pytest.mark.parametrize("max_duration", [1, 2, 3, K, 400])
@pytest.mark.parametrize("cls", PARAMETRIC)
def test_distribution_is_normalised(cls, max_duration):
    log_probability = cls(max_duration, C).double()()
    assert log_probability.shape == (max_duration, C)
    assert_close(log_probability.logsumexp(0), torch.zeros(C))


def test_every_distribution_accepts_one_duration():
    for distribution in every_distribution(max_duration=1):
        assert distribution().shape == (1, C)
        assert torch.isfinite(distribution()).all()


def test_geometric_matches_scipy():
    logit = np.array([-3.0, 0.0, 2.0])
    actual = GeometricDuration(K, C, init_logit=logit).double()()
    durations = np.arange(1, K + 1)[:, None]
    expected = scipy.stats.geom(scipy.special.expit(logit)).logpmf(durations)
    assert_close(actual, truncated(expected))


@pytest.mark.parametrize("max_duration", [1, 2, 3, 60])
def test_negative_binomial_matches_scipy(max_duration):
    log_r, logit = np.array([-2.0, 0.0, 3.0]), np.array([-1.0, 0.5, 1.0])
    actual = NegativeBinomialDuration(max_duration, C, log_r, logit).double()()
    failures = np.arange(max_duration)[:, None]
    expected = scipy.stats.nbinom(np.exp(log_r), scipy.special.expit(logit)).logpmf(failures)
    assert_close(actual, truncated(expected))


def test_negative_binomial_with_unit_r_is_geometric():
    negative_binomial = NegativeBinomialDuration(300, C, init_log_r=0.0, init_logit=-2.0)
    assert_close(negative_binomial(), GeometricDuration(300, C, init_logit=-2.0)())


def test_poisson_matches_scipy():
    log_lambda = np.array([-1.0, 1.0, 4.0])
    actual = PoissonDuration(K, C, init_log_lambda=log_lambda).double()()
    expected = scipy.stats.poisson(np.exp(log_lambda)).logpmf(np.arange(1, K + 1)[:, None])
    assert_close(actual, truncated(expected))


def test_poisson_in_float32_keeps_precision_at_long_durations():
    narrow = PoissonDuration(3000, 1, init_log_lambda=7.0)
    wide = copy.deepcopy(narrow).double()
    assert narrow().dtype == torch.float32
    torch.testing.assert_close(narrow(), wide().float(), rtol=1e-6, atol=1e-6)


def test_uniform_is_constant():
    assert_close(UniformDuration(K, C)(), torch.full((K, C), -np.log(K)))


# Extreme values and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_r", [-50.0, -10.0, 50.0, 100.0])
def test_negative_binomial_is_finite_at_extreme_r(log_r, dtype):
    distribution = NegativeBinomialDuration(100, C, init_log_r=log_r, init_logit=0.0).to(dtype)
    log_probability = distribution()
    assert torch.isfinite(log_probability).all()
    log_probability[50].sum().backward()
    assert torch.isfinite(distribution.log_r.grad).all()
    assert torch.isfinite(distribution.logit.grad).all()


def test_negative_binomial_at_tiny_r_is_its_logarithmic_limit():
    log_r, p = -50.0, 0.5
    actual = NegativeBinomialDuration(K, 1, init_log_r=log_r, init_logit=0.0).double()()[:, 0]
    failures = torch.arange(1, K, dtype=torch.float64)
    expected = log_r + failures * np.log(1 - p) - failures.log()
    assert_close(actual, torch.cat([torch.zeros(1, dtype=torch.float64), expected]))


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_geometric_is_finite_at_extreme_logits(logit):
    distribution = GeometricDuration(100, C, init_logit=logit)
    distribution()[50].sum().backward()
    assert torch.isfinite(distribution()).all()
    assert torch.isfinite(distribution.logit.grad).all()


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (GeometricDuration, {"init_logit": [-2.0, 0.0, 3.0]}),
        (PoissonDuration, {"init_log_lambda": [-1.0, 0.5, 3.0]}),
        (NegativeBinomialDuration, {"init_log_r": [-50.0, 0.0, 4.0], "init_logit": [0.0, -1, 2]}),
        (NegativeBinomialDuration, {"init_log_r": [-5.0, -1.0, 1.0], "init_logit": [0.0, -1, 2]}),
    ],
)
@pytest.mark.parametrize("max_duration", [1, 2, K])
def test_gradient_is_right(cls, values, max_duration):
    distribution = cls(max_duration, C, **values).double()
    names = [name for name, _ in distribution.named_parameters()]

    def call(*parameters):
        return torch.func.functional_call(distribution, dict(zip(names, parameters, strict=True)))

    inputs = [p.detach().clone().requires_grad_() for p in distribution.parameters()]
    assert torch.autograd.gradcheck(call, inputs)


# Learned and callable


def test_learned_scores_are_a_free_parameter():
    assert LearnedDuration(K, C, init_scale=0.0)().abs().sum() == 0
    draws = LearnedDuration(1000, C, init_scale=0.5)()
    assert isinstance(draws, torch.nn.Parameter)
    assert 0.45 < draws.std() < 0.55


def test_learned_starts_from_a_given_table_without_sharing_it():
    table = torch.arange(K * C, dtype=torch.float32).reshape(K, C)
    distribution = LearnedDuration(K, C, init_bias=table)
    assert_close(distribution(), table)
    table.zero_()
    assert distribution().sum() > 0


def test_callable_module_is_trained_and_saved():
    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(C))

        def forward(self, durations):
            return durations[:, None] * self.slope

    distribution = CallableDuration(K, C, Slope())
    assert list(distribution.state_dict()) == ["function.slope"]
    distribution().sum().backward()
    assert_close(distribution.function.slope.grad, torch.full((C,), K * (K + 1) / 2))


# Module behaviour


@pytest.mark.parametrize("name", ["learned", "geometric", "negative_binomial", "poisson"])
def test_learnable_chooses_parameters_or_buffers(name):
    learned = create_duration_distribution(name, K, C)
    fixed = create_duration_distribution(name, K, C, learnable=False)
    assert list(fixed.parameters()) == []
    assert {n for n, _ in learned.named_parameters()} == {n for n, _ in fixed.named_buffers()}
    assert not fixed().requires_grad
    assert learned().requires_grad


def test_state_dict_and_pickle_round_trip():
    for distribution in every_distribution():
        for values in distribution.parameters():
            torch.nn.init.normal_(values)
        fresh = next(d for d in every_distribution() if type(d) is type(distribution))
        fresh.load_state_dict(distribution.state_dict())
        assert_close(fresh(), distribution())
        assert_close(pickle.loads(pickle.dumps(distribution))(), distribution())
        assert_close(copy.deepcopy(distribution)(), distribution())


@pytest.mark.parametrize("cls", [*PARAMETRIC, LearnedDuration])
def test_dtype_follows_the_module(cls):
    assert cls(K, C)().dtype == torch.float32
    assert cls(K, C).double()().dtype == torch.float64
    assert cls(K, C).half()().dtype == torch.float16


# Fits to observed segments


def samples(draw, n=4000, max_duration=200):
    """n durations of label 0, 2n of label 1; label 2 is never seen."""
    durations = [np.clip(draw(label, (label + 1) * n), 1, max_duration) for label in range(2)]
    labels = np.repeat([0, 1], [n, 2 * n])
    return np.concatenate(durations), labels, max_duration, C


def generator():
    return np.random.default_rng(0)


def test_geometric_fit_recovers_the_parameter():
    rng, p = generator(), np.array([0.3, 0.05])
    arguments = samples(lambda label, n: rng.geometric(p[label], n))
    fitted = torch.sigmoid(GeometricDuration.from_segments(*arguments).logit).detach()
    np.testing.assert_allclose(fitted[:2], p, rtol=0.05)
    assert fitted[1] < fitted[2] < fitted[0]


def test_geometric_fit_accounts_for_truncation():
    # With K = 5 and p = 0.05 the observed mean is far below 1 / p.
    p, max_duration = 0.05, 5
    weights = (1 - p) ** np.arange(max_duration)
    durations = generator().choice(np.arange(1, 6), size=50_000, p=weights / weights.sum())
    fitted = GeometricDuration.from_segments(durations, np.zeros_like(durations), max_duration, 1)
    assert torch.sigmoid(fitted.logit).item() == pytest.approx(p, abs=0.01)


def test_poisson_fit_recovers_the_parameter():
    rng, rates = generator(), np.array([6.0, 80.0])
    arguments = samples(lambda label, n: rng.poisson(rates[label], n))
    fitted = PoissonDuration.from_segments(*arguments).log_lambda.exp().detach()
    np.testing.assert_allclose(fitted[:2], rates, rtol=0.02)
    assert fitted[0] < fitted[2] < fitted[1]


def test_negative_binomial_fit_recovers_the_parameters():
    rng, r, p = generator(), np.array([0.5, 8.0]), np.array([0.1, 0.2])
    arguments = samples(lambda label, n: 1 + rng.negative_binomial(r[label], p[label], n))
    fitted = NegativeBinomialDuration.from_segments(*arguments)
    np.testing.assert_allclose(fitted.log_r.exp().detach()[:2], r, rtol=0.15)
    np.testing.assert_allclose(torch.sigmoid(fitted.logit).detach()[:2], p, rtol=0.15)


def test_negative_binomial_fit_of_underdispersed_durations_peaks_at_their_mean():
    durations = np.array([20, 21, 20, 19, 20])
    fitted = NegativeBinomialDuration.from_segments(durations, np.zeros(5, int), 50, 1)
    probability = fitted().exp()[:, 0].detach()
    mean = (probability * torch.arange(1, 51)).sum().item()
    assert mean == pytest.approx(20, abs=0.2)


def test_learned_fit_is_close_to_the_histogram():
    rng = generator()
    durations, labels, max_duration, _ = samples(lambda label, n: rng.poisson(9 + 20 * label, n))
    fitted = LearnedDuration.from_segments(durations, labels, max_duration, C)
    probability = fitted().detach().exp()
    assert_close(probability.sum(0), torch.ones(C))
    for label in range(2):
        histogram = np.bincount(durations[labels == label] - 1, minlength=max_duration)
        histogram = histogram / histogram.sum()
        assert np.abs(probability[:, label].numpy() - histogram).sum() < 0.12
    assert torch.isfinite(fitted()).all()


def test_learned_fit_without_smoothing_is_the_log_histogram():
    fitted = LearnedDuration.from_segments([1, 1, 3], [0, 0, 0], 3, 1, bandwidth=0.0)
    expected = torch.tensor([[2 + 1 / 3], [1 / 3], [1 + 1 / 3]]) / 4
    assert_close(fitted(), expected.log())


def test_smoothing_loses_no_mass_at_the_ends():
    fitted = LearnedDuration.from_segments([1, 6], [0, 0], 6, 1, pseudo_count=1e-9, bandwidth=1.5)
    probability = fitted().exp()[:, 0].detach()
    assert_close(probability, probability.flip(0))
    assert probability[0] > probability[1] > probability[2]


@pytest.mark.parametrize("cls", [*PARAMETRIC, LearnedDuration])
def test_fit_gives_unseen_labels_the_pooled_fit(cls):
    durations, labels = torch.tensor([2, 3, 5, 5]), torch.tensor([0, 0, 2, 2])
    fitted = cls.from_segments(durations, labels, K, C)()
    pooled = cls.from_segments(durations, torch.zeros_like(labels), K, 1)()
    assert_close(fitted[:, 1], pooled[:, 0])


@pytest.mark.parametrize("cls", [*PARAMETRIC, LearnedDuration])
@pytest.mark.parametrize("max_duration", [1, 4])
@pytest.mark.parametrize("duration", [1, 4])
def test_fit_of_a_single_segment_is_finite(cls, max_duration, duration):
    fitted = cls.from_segments([min(duration, max_duration)], [0], max_duration, 1)
    assert torch.isfinite(fitted()).all()


def test_fit_passes_further_arguments_on():
    fitted = PoissonDuration.from_segments([2], [0], K, C, learnable=False)
    assert list(fitted.parameters()) == []


# Factory


@pytest.mark.parametrize("name", [n for n in DURATION_DISTRIBUTIONS if n != "callable"])
def test_factory_builds_by_name(name):
    distribution = create_duration_distribution(name, K, C)
    assert type(distribution) is DURATION_DISTRIBUTIONS[name]
    assert distribution().shape == (K, C)


def test_factory_passes_arguments_on():
    distribution = create_duration_distribution("geometric", 100, 24, init_logit=-2.0)
    assert_close(distribution.logit, torch.full((24,), -2.0))


def test_factory_accepts_instances_classes_functions_and_none():
    instance = PoissonDuration(K, C)
    assert create_duration_distribution(instance, K, C) is instance
    assert isinstance(create_duration_distribution(None, K, C), LearnedDuration)
    assert isinstance(create_duration_distribution(UniformDuration, K, C), UniformDuration)
    assert isinstance(create_duration_distribution(slopes, K, C), CallableDuration)
    assert create_duration_distribution("callable", K, C, function=slopes)().shape == (K, C)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: create_duration_distribution("weibull", K, C),
            ValueError,
            "`distribution` must be one of 'learned', 'geometric', 'negative_binomial', "
            "'poisson', 'uniform', 'callable', or a DurationDistribution; got 'weibull'.",
        ),
        (
            lambda: create_duration_distribution(3, K, C),
            TypeError,
            "`distribution` must be a name, a DurationDistribution or a callable; got int.",
        ),
        (
            lambda: create_duration_distribution(PoissonDuration(5, C), K, C),
            ValueError,
            "`distribution` must have max_duration=7 and num_classes=3; "
            "got max_duration=5 and num_classes=3.",
        ),
        (
            lambda: create_duration_distribution(PoissonDuration(K, C), K, C, learnable=False),
            TypeError,
            "a PoissonDuration instance takes no further arguments; got learnable.",
        ),
        (
            lambda: GeometricDuration(0, C),
            ValueError,
            "`max_duration` must be an integer >= 1; got 0.",
        ),
        (
            lambda: GeometricDuration(K, 2.0),
            ValueError,
            "`num_classes` must be an integer >= 1; got 2.0.",
        ),
        (
            lambda: GeometricDuration(K, C, init_logit=[0.0, 1.0]),
            ValueError,
            "`init_logit` must be a number or have shape (C=3,); got shape (2,).",
        ),
        (
            lambda: PoissonDuration(K, C, init_log_lambda=[0.0, 1.0, float("inf")]),
            ValueError,
            "`init_log_lambda` must be finite; got inf at index 2.",
        ),
        (
            lambda: LearnedDuration(K, C, init_scale=-1.0),
            ValueError,
            "`init_scale` must be finite and >= 0; got -1.0.",
        ),
        (
            lambda: LearnedDuration(K, C, init_bias=torch.zeros(C, K)),
            ValueError,
            "`init_bias` must be a floating tensor of shape (K=7, C=3); got shape (3, 7).",
        ),
        (
            lambda: LearnedDuration(2, 1, init_bias=torch.tensor([[0.0], [torch.nan]])),
            ValueError,
            "`init_bias` must be finite or -inf (forbidden); got nan at index (1, 0).",
        ),
        (
            lambda: CallableDuration(K, C, 5),
            TypeError,
            "`function` must be callable; got int.",
        ),
        (
            lambda: CallableDuration(K, C, lambda durations: durations)(),
            ValueError,
            "`function` must return a floating tensor of shape (K=7, C=3); got shape (7,).",
        ),
        (
            lambda: CallableDuration(K, C, lambda durations: 0.0)(),
            TypeError,
            "`function` must return a floating tensor of shape (K=7, C=3); got float.",
        ),
        (
            lambda: CallableDuration.from_segments([1], [0], K, C),
            TypeError,
            "CallableDuration cannot be fitted to segments.",
        ),
        (
            lambda: DurationDistribution(K, C)(),
            NotImplementedError,
            "DurationDistribution must implement forward().",
        ),
        (
            lambda: PoissonDuration.from_segments([1, 8], [0, 1], K, C),
            ValueError,
            "`durations` must be in [1, K=7]; got 8 at index 1.",
        ),
        (
            lambda: PoissonDuration.from_segments([1, 2], [-1, 1], K, C),
            ValueError,
            "`labels` must be in [0, C-1=2]; got -1 at index 0.",
        ),
        (
            lambda: PoissonDuration.from_segments([1, 2], [0], K, C),
            ValueError,
            "`durations` and `labels` must have one entry per segment; got 2 and 1 entries.",
        ),
        (
            lambda: PoissonDuration.from_segments([], [], K, C),
            ValueError,
            "`durations` must hold at least one segment; got 0.",
        ),
        (
            lambda: PoissonDuration.from_segments([1.5], [0], K, C),
            TypeError,
            "`durations` must hold integers; got dtype float64.",
        ),
        (
            lambda: PoissonDuration.from_segments([[1]], [0], K, C),
            ValueError,
            "`durations` must have shape (N,); got shape (1, 1).",
        ),
        (
            lambda: LearnedDuration.from_segments([1], [0], K, C, pseudo_count=0),
            ValueError,
            "`pseudo_count` must be finite and > 0; got 0.",
        ),
        (
            lambda: LearnedDuration.from_segments([1], [0], K, C, bandwidth=-1.0),
            ValueError,
            "`bandwidth` must be finite and >= 0; got -1.0.",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as info:
        call()
    assert str(info.value) == message
