"""What the estimator minimises: the losses that are sums over positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from flash_semicrf import Segment
from flash_semicrf.nn.objectives import LOSSES, marginal_loss
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.testing import assert_close, random_problem
from sklearn_api import SemiCRFSegmenter
from sklearn_api._training.crop_likelihood import crop_loss
from sklearn_api._training.objective import Objective, losses_of
from tests.flash_semicrf.cases import message_of


def table_of(segments, count=1):
    """The same segments (start, stop, label) in each of some sequences."""
    return segments_to_table([[Segment(s, t - 1, c) for s, t, c in segments]] * count)


def data(count=6, seed=0, spread=1.0):
    """Signals whose mean is their label, 1 for a tenth of the time."""
    rng = np.random.default_rng(seed)
    X, y = [], []
    for _ in range(count):
        gaps = rng.integers(5, 28, 3)
        labels = np.repeat([0, 1, 0, 1, 0], [gaps[0], 3, gaps[1], 4, max(1, 53 - gaps[:2].sum())])
        labels = labels[:60]
        X.append(labels[:, None] + rng.normal(0, spread, (len(labels), 1)))
        y.append(labels)
    return X, y


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("crop_length", [None, 25])
def test_every_loss_is_lowered_and_learns(loss, crop_length):
    X, y = data(spread=0.3)
    model = SemiCRFSegmenter(
        loss=loss, crop_length=crop_length, max_epochs=60, learning_rate=0.05, random_state=0
    ).fit(X, y)
    losses = [row["train_loss"] for row in model.history_]
    assert losses[-1] < 0.5 * losses[0]
    assert model.score(X, y) > 0.95


def recall(model, X, y):
    found = np.concatenate(list(model.predict(X)))
    return float((found == 1)[np.concatenate(y) == 1].mean())


def test_class_weights_raise_the_recall_of_a_rare_label():
    X, y = data(12)
    held_out = data(12, seed=1)
    options = {"max_epochs": 60, "learning_rate": 0.05, "max_duration": 60, "random_state": 0}
    plain = SemiCRFSegmenter(loss="marginal", **options).fit(X, y)
    heavy = SemiCRFSegmenter(loss="marginal", class_weight={1: 15.0}, **options).fit(X, y)
    assert recall(heavy, *held_out) > recall(plain, *held_out) + 0.1


def test_positions_of_weight_zero_may_have_any_label():
    problem = random_problem(2, 8, 3, 2, ragged=False)
    weights = torch.ones(2, 8, dtype=torch.float64)
    weights[:, 4:] = 0.0
    objective = Objective("marginal")
    tables = [
        table_of([(0, 2, 0), (2, 4, 1), (4, 6, c), (6, 8, d)], 2) for c, d in ((0, 1), (1, 0))
    ]
    first, second = (losses_of(objective, problem, t, None, weights, "auto") for t in tables)
    assert_close(first, second)


def test_a_crop_counts_its_own_positions_given_its_ends():
    problem = random_problem(1, 8, 4, 2, ragged=False)
    table = table_of([(0, 3, 0), (3, 5, 1), (5, 8, 0)])
    # The cuts were at 1 and at 7: the first segment holds two positions, the last one two.
    crop = torch.tensor([[0, 0, 2, 2]])
    found = losses_of(Objective("marginal"), problem, table, crop, None, "auto")
    own = torch.zeros(1, 8).index_fill(1, torch.arange(1, 7), 1.0)
    given = problem.scores.clone()
    given[0, [0, 7], 1] = -torch.inf
    joined = torch.zeros_like(given)
    joined[0, [1, 7]] = -torch.inf  # no segment starts inside what is known to be one
    known = problem.replace(scores=given, start_scores=joined)
    assert_close(found, marginal_loss(known, table, own))
    doubled = losses_of(Objective("marginal"), problem, table, crop, 2 * torch.ones(1, 8), "auto")
    assert_close(doubled, 2 * found)
    weights = torch.arange(8.0).double()[None]
    likelihood = losses_of(Objective(), problem, table, crop, weights, "auto")
    assert_close(likelihood, 3.5 * crop_loss(problem, table, crop))  # the mean of 1 to 6


def test_losses_are_searched_and_cloned():
    X, y = data(6, spread=0.5)
    model = SemiCRFSegmenter(max_epochs=3, margin_cost=2.0, focus=1.0, random_state=0)
    assert clone(model).get_params()["margin_cost"] == 2.0
    search = GridSearchCV(model, {"loss": ["likelihood", "marginal"]}, cv=2).fit(X, y)
    assert search.best_params_["loss"] in ("likelihood", "marginal")


def test_l_bfgs_takes_the_likelihood_alone():
    X, y = data(2)
    model = SemiCRFSegmenter(solver="lbfgs", loss="marginal")
    assert "`loss` needs a solver of mini-batches" in message_of(ValueError, model.fit, X, y)
