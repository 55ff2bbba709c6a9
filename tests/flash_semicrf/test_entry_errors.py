"""Bad input: an error that says what must hold, what came, and where; at every public entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.compat import (
    compute_edge_block_streaming,
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import at, message_of

B, T, K, C = 2, 5, 3, 4
PROBLEM = random_problem(B, T, K, C, boundary=True, ends=True, ragged=False)
BY_DURATION = random_problem(B, T, K, C, by_duration=True, ragged=False)
POTENTIALS_ENTRIES = [log_partition, viterbi, viterbi_table, segment_marginals]


def cumulative(potentials: Potentials) -> torch.Tensor:
    return torch.nn.functional.pad(potentials.scores.cumsum(1), (0, 0, 1, 0))


def forward_from(potentials: Potentials, **options):
    return semi_crf_streaming_forward(*arguments_of(potentials), **options)


def back_pointers_from(potentials: Potentials, **options):
    return semi_crf_streaming_viterbi_with_backpointers(*arguments_of(potentials), **options)


def edge_block_from(potentials: Potentials):
    cum_scores, transition, duration_bias, *_ = arguments_of(potentials)
    return compute_edge_block_streaming(cum_scores, transition, duration_bias, 0, 1)


def arguments_of(p: Potentials) -> tuple:
    k = p.duration_bias.shape[0] if isinstance(p.duration_bias, torch.Tensor) else K
    return cumulative(p), p.transition, p.duration_bias, p.lengths, k


ENTRIES = [*POTENTIALS_ENTRIES, forward_from, back_pointers_from]
ENTRY_NAMES = [entry.__name__ for entry in ENTRIES]


SHARED = {
    # name: (fields changed, kind of error, message); true of potentials and cumulative scores
    "transition not a tensor": (
        {"transition": [[0.0]]},
        TypeError,
        "`transition` must be a Tensor; got list.",
    ),
    "transition missing": (
        {"transition": None},
        TypeError,
        "`transition` must be a Tensor; got NoneType.",
    ),
    "transition integer": (
        {"transition": torch.zeros(C, C, dtype=torch.int64)},
        TypeError,
        "`transition` must have a floating-point dtype; got torch.int64.",
    ),
    "transition not square": (
        {"transition": torch.zeros(C, 1)},
        ValueError,
        "`transition` must have shape (4, 4) or (3, 4, 4); got (4, 1).",
    ),
    "transition of another K": (
        {"transition": torch.zeros(K + 1, C, C)},
        ValueError,
        "`transition` must have shape (4, 4) or (3, 4, 4); got (4, 4, 4).",
    ),
    "transition elsewhere": (
        {"transition": torch.zeros(C, C, device="meta")},
        ValueError,
        "`transition` must be on the device of `scores`, cpu; got meta.",
    ),
    "transition NaN": (
        {"transition": at(PROBLEM.transition, (1, 2), math.nan)},
        ValueError,
        "`transition` must be finite or -inf (forbidden); got nan at index (1, 2).",
    ),
    "transition by duration NaN": (
        {"transition": at(BY_DURATION.transition, (2, 3, 1), math.nan)},
        ValueError,
        "`transition` must be finite or -inf (forbidden); got nan at index (2, 3, 1).",
    ),
    "duration bias complex": (
        {"duration_bias": torch.zeros(K, C, dtype=torch.complex64)},
        TypeError,
        "`duration_bias` must have a floating-point dtype; got torch.complex64.",
    ),
    "duration bias of other labels": (
        {"duration_bias": torch.zeros(K, C + 1)},
        ValueError,
        "`duration_bias` must have shape (K, C=4) with K >= 1; got (3, 5).",
    ),
    "duration bias infinite": (
        {"duration_bias": at(PROBLEM.duration_bias, (2, 0), math.inf)},
        ValueError,
        "`duration_bias` must be finite or -inf (forbidden); got inf at index (2, 0).",
    ),
    "lengths a list": (
        {"lengths": [5, 5]},
        TypeError,
        "`lengths` must be a Tensor; got list.",
    ),
    "lengths floating": (
        {"lengths": torch.tensor([5.0, 5.0])},
        TypeError,
        "`lengths` must have an integer dtype; got torch.float32.",
    ),
    "lengths boolean": (
        {"lengths": torch.tensor([True, True])},
        TypeError,
        "`lengths` must have an integer dtype; got torch.bool.",
    ),
    "lengths of another batch": (
        {"lengths": torch.tensor([5])},
        ValueError,
        "`lengths` must have shape (2,); got (1,).",
    ),
    "length zero": (
        {"lengths": torch.tensor([5, 0])},
        ValueError,
        "`lengths` must be in [1, T=5]; got 0 at index 1.",
    ),
    "length beyond T": (
        {"lengths": torch.tensor([6, 0])},
        ValueError,
        "`lengths` must be in [1, T=5]; got 6 at index 0.",
    ),
}

OF_POTENTIALS = {
    "scores not a tensor": (
        {"scores": np.zeros((B, T, C))},
        TypeError,
        "`scores` must be a Tensor; got ndarray.",
    ),
    "scores integer": (
        {"scores": torch.zeros(B, T, C, dtype=torch.int32)},
        TypeError,
        "`scores` must have a floating-point dtype; got torch.int32.",
    ),
    "scores of two dimensions": (
        {"scores": torch.zeros(T, C)},
        ValueError,
        "`scores` must have shape (B, T, C), each >= 1; got (5, 4).",
    ),
    "scores empty": (
        {"scores": torch.zeros(B, 0, C)},
        ValueError,
        "`scores` must have shape (B, T, C), each >= 1; got (2, 0, 4).",
    ),
    "scores NaN": (
        {"scores": at(PROBLEM.scores, (1, 4, 3), math.nan)},
        ValueError,
        "`scores` must be finite or -inf (forbidden); got nan at index (1, 4, 3).",
    ),
    "scores infinite": (
        {"scores": at(PROBLEM.scores, (0, 2, 1), math.inf)},
        ValueError,
        "`scores` must be finite or -inf (forbidden); got inf at index (0, 2, 1).",
    ),
    "K zero": (
        {"duration_bias": torch.zeros(0, C)},
        ValueError,
        "`duration_bias` must have shape (K, C=4) with K >= 1; got (0, 4).",
    ),
    "start scores of another T": (
        {"start_scores": torch.zeros(B, T + 1, C)},
        ValueError,
        "`start_scores` must have shape (2, 5, 4); got (2, 6, 4).",
    ),
    "end scores elsewhere": (
        {"end_scores": torch.zeros(B, T, C, device="meta")},
        ValueError,
        "`end_scores` must be on the device of `scores`, cpu; got meta.",
    ),
    "end scores NaN": (
        {"end_scores": at(PROBLEM.end_scores, (0, 0, 0), math.nan)},
        ValueError,
        "`end_scores` must be finite or -inf (forbidden); got nan at index (0, 0, 0).",
    ),
    "initial scores of two dimensions": (
        {"initial_scores": torch.zeros(1, C)},
        ValueError,
        "`initial_scores` must have shape (4,); got (1, 4).",
    ),
    "final scores integer": (
        {"final_scores": torch.zeros(C, dtype=torch.int64)},
        TypeError,
        "`final_scores` must have a floating-point dtype; got torch.int64.",
    ),
    "final scores infinite": (
        {"final_scores": at(PROBLEM.final_scores, (3,), math.inf)},
        ValueError,
        "`final_scores` must be finite or -inf (forbidden); got inf at index (3,).",
    ),
}


@pytest.mark.parametrize("entry", ENTRIES, ids=ENTRY_NAMES)
@pytest.mark.parametrize("bad", SHARED)
def test_every_entry_refuses_bad_shared_parameters(entry, bad):
    changes, kind, message = SHARED[bad]
    assert message_of(kind, entry, PROBLEM.replace(**changes)) == message


@pytest.mark.parametrize("entry", POTENTIALS_ENTRIES)
@pytest.mark.parametrize("bad", OF_POTENTIALS)
def test_entries_refuse_bad_potentials(entry, bad):
    changes, kind, message = OF_POTENTIALS[bad]
    assert message_of(kind, entry, PROBLEM.replace(**changes)) == message


@pytest.mark.parametrize("entry", POTENTIALS_ENTRIES)
def test_entries_refuse_what_is_no_problem(entry):
    message = message_of(TypeError, entry, PROBLEM.scores)
    assert message == "`potentials` must be a Potentials; got Tensor."


@pytest.mark.parametrize("entry", ENTRIES, ids=ENTRY_NAMES)
def test_every_entry_refuses_an_unknown_backend(entry):
    message = message_of(ValueError, entry, PROBLEM, backend="cuda")
    choices = ", ".join(repr(name) for name in ("auto", *BACKENDS))
    assert message == f"`backend` must be one of {choices}; got 'cuda'."


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("entry", [viterbi, viterbi_table])
def test_decoding_names_infeasible_sequences(entry, backend):
    scores = PROBLEM.scores.clone()
    scores[1, 2] = -math.inf
    assert message_of(ValueError, entry, PROBLEM.replace(scores=scores), backend) == (
        "No segmentation is feasible for sequences [1]: every one meets a forbidden (-inf) score, "
        "transition or duration."
    )


def test_max_semiring_names_infeasible_sequences():
    problem = PROBLEM.replace(transition=torch.full((C, C), -math.inf))
    message = message_of(ValueError, forward_from, problem, semiring="max")
    assert message.startswith("No segmentation is feasible for sequences [0, 1]: ")


CUMULATIVE = {
    "not a tensor": (
        [[0.0]],
        TypeError,
        "`cum_scores` must be a Tensor; got list.",
    ),
    "integer": (
        torch.zeros(B, T + 1, C, dtype=torch.int64),
        TypeError,
        "`cum_scores` must have a floating-point dtype; got torch.int64.",
    ),
    "two dimensions": (
        torch.zeros(T + 1, C),
        ValueError,
        "`cum_scores` must have shape (B, T+1, C) with B, T, C >= 1; got (6, 4).",
    ),
    "no position": (
        torch.zeros(B, 1, C),
        ValueError,
        "`cum_scores` must have shape (B, T+1, C) with B, T, C >= 1; got (2, 1, 4).",
    ),
    "no label": (
        torch.zeros(B, T + 1, 0),
        ValueError,
        "`cum_scores` must have shape (B, T+1, C) with B, T, C >= 1; got (2, 6, 0).",
    ),
    "NaN": (
        at(torch.zeros(B, T + 1, C), (1, 5, 0), math.nan),
        ValueError,
        "`cum_scores` must be finite; got nan at index (1, 5, 0). To forbid labels at positions, "
        "pass Potentials with -inf scores to log_partition().",
    ),
    "-inf": (
        at(torch.zeros(B, T + 1, C), (0, 3, 2), -math.inf),
        ValueError,
        "`cum_scores` must be finite; got -inf at index (0, 3, 2). To forbid labels at positions, "
        "pass Potentials with -inf scores to log_partition().",
    ),
}


@pytest.mark.parametrize(
    "entry", [semi_crf_streaming_forward, semi_crf_streaming_viterbi_with_backpointers]
)
@pytest.mark.parametrize("bad", CUMULATIVE)
def test_cumulative_entries_refuse_bad_scores(entry, bad):
    cum_scores, kind, message = CUMULATIVE[bad]
    _, *others = arguments_of(PROBLEM)
    assert message_of(kind, entry, cum_scores, *others) == message


@pytest.mark.parametrize(
    "entry", [semi_crf_streaming_forward, semi_crf_streaming_viterbi_with_backpointers]
)
@pytest.mark.parametrize(
    ("max_duration", "message"),
    [
        (0, "`K` must be an integer >= 1; got 0."),
        (-3, "`K` must be an integer >= 1; got -3."),
        (2.0, "`K` must be an integer >= 1; got 2.0."),
        (True, "`K` must be an integer >= 1; got True."),
        (4, "`duration_bias` must have shape (K=4, C); got (3, 4)."),
    ],
)
def test_cumulative_entries_refuse_a_bad_longest_duration(entry, max_duration, message):
    *others, _ = arguments_of(PROBLEM)
    assert message_of(ValueError, entry, *others, max_duration) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semiring": "sum"}, "`semiring` must be one of 'log', 'max'; got 'sum'."),
        ({"num_warps": 0}, "`num_warps` must be an integer >= 1; got 0."),
    ],
)
def test_forward_refuses_bad_options(options, message):
    assert message_of(ValueError, forward_from, PROBLEM, **options) == message


@pytest.mark.parametrize(
    ("start", "k", "message"),
    [
        (0, 0, "`k` must be in [1, K=3]; got 0."),
        (0, 4, "`k` must be in [1, K=3]; got 4."),
        (-1, 2, "`start` must be in [0, T-k=3]; got -1 with k=2."),
        (4, 2, "`start` must be in [0, T-k=3]; got 4 with k=2."),
    ],
)
def test_edge_block_refuses_segments_outside(start, k, message):
    cum_scores, transition, duration_bias, *_ = arguments_of(PROBLEM)
    block = compute_edge_block_streaming
    assert message_of(ValueError, block, cum_scores, transition, duration_bias, start, k) == message


@pytest.mark.parametrize("bad", [name for name in SHARED if not name.startswith("length")])
def test_edge_block_refuses_bad_parameters(bad):
    changes, kind, message = SHARED[bad]
    assert message_of(kind, edge_block_from, PROBLEM.replace(**changes)) == message
