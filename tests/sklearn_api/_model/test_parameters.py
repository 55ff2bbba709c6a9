"""Parameters of `SemiCRFSegmenter` that `fit` refuses, by name, with what came and what must."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback, EpochTimer

from sklearn_api import SemiCRFSegmenter
from sklearn_api._sklearn import Interval


def data():
    y = [np.repeat(["a", "b", "a"], [4, 6, 3]), np.repeat(["a", "b"], [5, 2])]
    return [np.arange(len(one), dtype=float)[:, None] for one in y], y


def refuse(message, sample_weight=None, **params):
    """Every solver refuses it: checks do not depend on the path that training takes."""
    given = params.pop("solver", None)
    for solver in (given,) if given else ("adam", "lbfgs"):
        segmenter = SemiCRFSegmenter(solver=solver, **params)
        with pytest.raises(ValueError, match=message):
            segmenter.fit(*data(), sample_weight=sample_weight)


NUMBERS = sorted(
    name
    for name, constraints in SemiCRFSegmenter._parameter_constraints.items()
    if any(isinstance(c, Interval) for c in constraints)
)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_neither_nan_nor_infinite_nor_bool(name):
    for value in (np.nan, np.inf, True):
        refuse(f"['`]{name}['`].*{value}", **{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (8, r"an integer in \[1, max_duration=6\]; got 8\."),
        ({"b": 8}, r"an integer in \[1, max_duration=6\]; got 8 for label 'b'"),
        ({"b": 0}, "got 0 for label 'b'"),
        ({"b": 2.0}, "got 2.0 for label 'b'"),
        ({"b": True}, "got True for label 'b'"),
        ({"b": np.nan}, "got nan for label 'b'"),
        ({"b": "3"}, "got '3' for label 'b'"),
        ({"c": 3}, r"must be in \['a', 'b'\]; got 'c'"),
        ({"b": 3}, r"allow; got label 'b' at positions 5..6 \(duration 2, after .* in sequence 1"),
    ],
    ids=str,
)
def test_min_duration(given, message):
    refuse(f"`min_duration`.*{message}", min_duration=given)


def test_minus_infinity_as_tail_of_a_long_segment():
    place = r"got label 'a' at positions 0..3 \(duration 4\) in sequence 0"
    refuse(
        f"`duration_tail` must be above -inf .*=3; {place}", duration_tail=-np.inf, max_duration=3
    )


def no_longer_than_five(durations):
    scores = torch.zeros(len(durations), 2)
    return scores.masked_fill(durations[:, None] > 5, -torch.inf)


def test_gold_segment_whose_duration_the_distribution_forbids():
    message = r"`duration_distribution` .* got label 'b' at positions 4..9 \(duration 6"
    refuse(message, duration_distribution=no_longer_than_five)


@pytest.mark.parametrize("device", ["gpu", "", "abacus", "meta", "cuda:99", "mps", "xpu"])
def test_device_that_is_unknown_or_absent(device):
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        pytest.skip("the messages are those of a machine with a CPU only")
    refuse(f"`device`.*{device!r}", device=device)


class Named(Callback):
    """A callback, as an instance or as a class."""


@pytest.mark.parametrize(
    ("callbacks", "got"),
    [
        ([len], "<built-in function len> at index 0"),
        ([EpochTimer(), dict], "<class 'dict'> at index 1"),
        ([("timer",)], "('timer',) at index 0"),
        ([("timer", 3)], "('timer', 3) at index 0"),
        ([(3, EpochTimer())], "(3, <skorch"),
        (("timer", EpochTimer()), "'timer' at index 0"),
    ],
    ids=["function", "class", "name alone", "number", "numbered", "no list"],
)
def test_callbacks_of_a_wrong_type(callbacks, got):
    message = "`callbacks` must hold skorch callbacks, or pairs .*; got " + re.escape(got)
    refuse(message, callbacks=callbacks, solver="adam")


def test_callbacks_in_each_form():
    callbacks = [Named(), Named, ("one", Named()), ("two", Named), ("none", None)]
    model = SemiCRFSegmenter(max_epochs=1, callbacks=callbacks).fit(*data())
    assert sum(isinstance(callback, Named) for _, callback in model.net_.callbacks_) == 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factors_of_the_loss_must_not_overflow(dtype):
    big = 2 * float(np.sqrt(np.finfo(dtype).max))
    text = f"must be at most .* in size, or gradients overflow in {dtype}; got"
    refuse(f"`alpha` {text} {big:g}".replace("+", r"\+"), alpha=big, dtype=dtype)
    refuse(f"`duration_tail` {text} -", duration_tail=-big, dtype=dtype)
    refuse(f"`class_weight` {text} .* for label 'b'", class_weight={"b": big}, dtype=dtype)
    refuse(f"`sample_weight` {text} .* in sequence 1", sample_weight=[1, big], dtype=dtype)
    half = np.sqrt(big)
    refuse(
        f"`sample_weight` times `class_weight` {text} .* in sequence 0",
        sample_weight=half,
        class_weight={"a": half},
        dtype=dtype,
    )


@pytest.mark.parametrize("name", ["optimizer__lr", "iterator_train__drop_last", "callbacks__timer"])
def test_lbfgs_takes_nothing_that_belongs_to_mini_batches(name):
    refuse(f"`{name}` needs a solver of mini-batches; got 0.5", solver="lbfgs", **{name: 0.5})
