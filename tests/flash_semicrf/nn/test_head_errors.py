"""What `SemiMarkovCRFHead` refuses, and how it says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flash_semicrf.duration import PoissonDuration
from flash_semicrf.problem.segments import SegmentTable
from tests.flash_semicrf.nn.test_head import (
    CHOICES,
    METHODS,
    NO_REPEAT,
    C,
    D,
    T,
    make_head,
    make_hidden,
    make_labels,
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "`num_classes` must be an integer >= 1; got 0."),
        ({"max_duration": 0}, ValueError, "`max_duration` must be an integer >= 1; got 0."),
        ({"hidden_dim": -1}, ValueError, "`hidden_dim` must be an integer >= 1; got -1."),
        ({"init_scale": -0.1}, ValueError, "`init_scale` must be finite and >= 0; got -0.1."),
        (
            {"edge_memory_threshold": 0},
            ValueError,
            "`edge_memory_threshold` must be > 0; got 0.",
        ),
        ({"num_warps": 0}, ValueError, "`num_warps` must be an integer >= 1; got 0."),
        (
            {"centering": "mean"},
            ValueError,
            "`centering` must be one of 'position', 'sequence', 'none'; got 'mean'.",
        ),
        (
            {"long_segments": "clamp"},
            ValueError,
            "`long_segments` must be one of 'split', 'error'; got 'clamp'.",
        ),
        (
            {"hidden_dim": None, "boundary_scores": True},
            ValueError,
            "`boundary_scores`=True needs `hidden_dim`; got hidden_dim=None.",
        ),
        (
            {"min_duration": 4},
            ValueError,
            "`min_duration` must be an integer in [1, K=3]; got 4 for label 0.",
        ),
        (
            {"min_duration": [1, 0]},
            ValueError,
            "`min_duration` must be an integer in [1, K=3]; got 0 for label 1.",
        ),
        (
            {"min_duration": {1: 1.5}},
            ValueError,
            "`min_duration` must be an integer in [1, K=3]; got 1.5 for label 1.",
        ),
        (
            {"min_duration": {"a": 2}},
            ValueError,
            "`min_duration` must have keys in [0, C-1=1]; got 'a'.",
        ),
        (
            {"duration_tail": float("nan")},
            ValueError,
            "`duration_tail` must be finite or -inf (forbidden); got nan at index (0,).",
        ),
        (
            {"duration_tail": True},
            TypeError,
            "`duration_tail` must be a number or an array of numbers; got True.",
        ),
        (
            {"min_duration": {2: 1}},
            ValueError,
            "`min_duration` must have keys in [0, C-1=1]; got 2.",
        ),
        (
            {"min_duration": [1]},
            ValueError,
            "`min_duration` must have one entry per label, C=2; got 1 entries.",
        ),
        (
            {"transition_constraints": torch.ones(C, C)},
            TypeError,
            "`transition_constraints` must have dtype bool; got torch.float32.",
        ),
        (
            {"transition_constraints": torch.ones(3, C, dtype=torch.bool)},
            ValueError,
            "`transition_constraints` must have shape (2, 2); got (3, 2).",
        ),
        (
            {"duration_distribution": "gamma"},
            ValueError,
            "`distribution` must be one of 'learned', 'geometric', 'negative_binomial', "
            "'poisson', 'uniform', 'callable', or a DurationDistribution; got 'gamma'.",
        ),
    ],
)
def test_bad_option_is_named(arguments, error, message):
    with pytest.raises(error) as info:
        make_head(**arguments)
    assert str(info.value) == message


def call(method="compute_loss", **changes):
    """Arguments of one method with some replaced."""
    head = make_head(**changes.pop("head", {}))
    hidden, lengths = make_hidden(head)
    arguments = {"hidden_states": hidden, "lengths": lengths}
    if method == "compute_loss":
        arguments["labels"] = make_labels(lengths, T)
    getattr(head, method)(**{**arguments, **changes})


def with_nan():
    hidden = torch.zeros(3, T, D)
    hidden[2, 1, 3] = torch.nan
    return hidden


def table(*rows):
    return SegmentTable(*torch.tensor(rows).unbind(1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden_states": torch.zeros(3, T, 5)},
            ValueError,
            "`hidden_states` must have shape (B, T, D=hidden_dim=4) with B, T >= 1; got (3, 4, 5).",
        ),
        (
            {"head": {"hidden_dim": None}, "hidden_states": torch.zeros(3, C)},
            ValueError,
            "`hidden_states` must have shape (B, T, C=num_classes=2) with B, T >= 1; got (3, 2).",
        ),
        (
            {"hidden_states": torch.zeros(3, T, D, dtype=torch.long)},
            TypeError,
            "`hidden_states` must have a floating-point dtype; got torch.int64.",
        ),
        (
            {"hidden_states": np.zeros((3, T, D))},
            TypeError,
            "`hidden_states` must be a Tensor; got ndarray.",
        ),
        (
            {"hidden_states": with_nan()},
            ValueError,
            "`hidden_states` must be finite or -inf (forbidden); got nan at index (2, 1, 3).",
        ),
        (
            {"lengths": torch.tensor([4, 5, 3])},
            ValueError,
            "`lengths` must be in [1, T=4]; got 5 at index 1.",
        ),
        ({"lengths": [4, 1, 3]}, TypeError, "`lengths` must be a Tensor; got list."),
        (
            {"lengths": torch.tensor([4, 1])},
            ValueError,
            "`lengths` must have shape (3,); got (2,).",
        ),
        (
            {"labels": torch.zeros(3, 5, dtype=torch.long)},
            ValueError,
            "`labels` must have shape (3, 4); got (3, 5).",
        ),
        (
            {"labels": torch.tensor([[0, 0, 1, 2], [0] * 4, [0] * 4])},
            ValueError,
            "`labels` must be in [0, C-1=1]; got 2 at index (0, 3).",
        ),
        (
            {"labels": torch.zeros(3, T)},
            TypeError,
            "`labels` must have an integer dtype; got torch.float32.",
        ),
        (
            {"labels": [[0] * 4] * 3},
            TypeError,
            "`labels` must be a Tensor or a SegmentTable; got list.",
        ),
        (
            {"labels": table((0, 0, 2, 0), (0, 3, 4, 0), (1, 0, 1, 0), (2, 0, 3, 0))},
            ValueError,
            "Segments must tile each sequence without gap or overlap; got [3, 4) with label 0 "
            "in sequence 0.",
        ),
        (
            {"reduction": "max"},
            ValueError,
            "`reduction` must be one of 'mean', 'sum', 'none'; got 'max'.",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            f"`backend` must be one of {str(CHOICES)[1:-1]}; got 'cuda'.",
        ),
        (
            {"head": {"min_duration": {0: 2}}},
            ValueError,
            "`labels` must be a segmentation that the model allows; in sequence 0 the segment at "
            "positions 0..0 with label 0, duration 1, has score -inf (check transition "
            "constraints, minimum durations and scores of -inf).",
        ),
        (
            {
                "head": {"transition_constraints": ~NO_REPEAT},
                "lengths": torch.tensor([1, 1, 3]),
            },
            ValueError,
            "`labels` must be a segmentation that the model allows; in sequence 2 the segment at "
            "positions 1..1 with label 1, duration 1, has score -inf (check transition "
            "constraints, minimum durations and scores of -inf).",
        ),
    ],
)
def test_bad_input_of_compute_loss_is_named(changes, error, message):
    with pytest.raises(error) as info:
        call(**changes)
    assert str(info.value) == message


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_of_every_method_is_named(method):
    with pytest.raises(ValueError, match=r"`lengths` must be in \[1, T=4\]; got 0 at index 1"):
        call(method, lengths=torch.tensor([4, 0, 3]))
    with pytest.raises(ValueError, match=r"`hidden_states` must be finite"):
        call(method, hidden_states=with_nan())
    with pytest.raises(ValueError, match="`backend` must be one of"):
        call(method, backend="fast")


def test_parameter_penalty_refuses_a_power_of_zero():
    with pytest.raises(ValueError, match=r"`p` must be > 0; got 0\."):
        make_head().parameter_penalty(p=0)


def test_duration_distribution_of_another_shape_is_named():
    head = make_head()
    head.duration_distribution = PoissonDuration(5, C)
    with pytest.raises(ValueError) as info:
        head.duration_bias  # noqa: B018
    assert str(info.value) == "`duration_distribution` must return shape (K=3, C=2); got (5, 2)."


def test_triton_kernels_say_why_they_do_not_run_on_the_cpu():
    with pytest.raises(ValueError, match='backend="triton" cannot run this problem: '):
        call(backend="triton")


def test_triton_backend_contradicts_use_triton_false():
    with pytest.raises(ValueError) as info:
        call(backend="triton", use_triton=False)
    assert str(info.value) == "`backend`='triton' contradicts `use_triton`=False."
