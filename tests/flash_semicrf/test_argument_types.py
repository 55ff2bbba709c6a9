"""What is no tensor, no integer or no table: named, wherever it is passed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flash_semicrf import (
    BandedMatrix,
    BlockTriangularMatrix,
    Constraints,
    SemiCRFDistribution,
    SemiMarkov,
    SemiMarkovCRFHead,
    UncertaintySemiMarkovCRFHead,
    apply_permutation,
    log_partition,
    measure_effective_bandwidth,
    n_best,
    rcm_ordering_from_adjacency,
    sample,
    segment_probabilities,
    viterbi,
)
from flash_semicrf.compat import (
    compute_edge_block_streaming,
    launch_streaming_triton_backward,
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.duration import LearnedDuration
from flash_semicrf.inference.partial import partial_score
from flash_semicrf.problem.potentials import center_scores
from flash_semicrf.problem.segments import labels_to_table, limit_durations, segments_to_table
from flash_semicrf.semirings import KMaxSemiring, LogSemiring
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import message_of

PROBLEM = random_problem(2, 5, 3, 3, ragged=False)
SCORES, LENGTHS = PROBLEM.scores, PROBLEM.lengths
LABELS = torch.tensor([[0, 0, 1, 1, 2]] * 2)
TABLE = labels_to_table(LABELS, LENGTHS)
SHARED = {
    "cum_scores": torch.nn.functional.pad(SCORES.cumsum(1), (0, 0, 1, 0)),
    "transition": PROBLEM.transition,
    "duration_bias": PROBLEM.duration_bias,
}
CUMULATIVE = {**SHARED, "lengths": LENGTHS, "K": 3}
HIDDEN = {"hidden_states": SCORES, "lengths": LENGTHS}
EDGES, PARTS = torch.zeros(1, 3, 3, 2, 2), torch.zeros(1, 3, 3, 2, 2)
BLOCKS = BlockTriangularMatrix.from_dense(torch.zeros(4, 4), K=2, C=2, span=2)
HEAD = UncertaintySemiMarkovCRFHead(3, 3)


def constrained(**known):
    return log_partition(PROBLEM, constraints=Constraints(**known))


CALLS = {
    "semi_crf_streaming_forward": (semi_crf_streaming_forward, CUMULATIVE),
    "back-pointers": (semi_crf_streaming_viterbi_with_backpointers, CUMULATIVE),
    "backward": (launch_streaming_triton_backward, {**SHARED, "lengths": [5, 5], "K": 3}),
    "edge block": (compute_edge_block_streaming, {**SHARED, "start": 0, "k": 1}),
    "labels_to_table": (labels_to_table, {"labels": LABELS, "lengths": LENGTHS}),
    "limit_durations": (
        limit_durations,
        {"table": TABLE, "max_duration": 1, "unlimited": torch.ones(3, dtype=torch.bool)},
    ),
    "center_scores": (center_scores, {"scores": SCORES, "lengths": LENGTHS}),
    "from_labels": (
        Constraints.from_labels,
        {"labels": LABELS, "lengths": LENGTHS, "max_duration": 3},
    ),
    "partial_score": (lambda labels: partial_score(PROBLEM, labels), {"labels": LABELS}),
    "constraints": (constrained, {"labels": LABELS}),
    "constraints, allowed": (constrained, {"allowed": torch.ones(2, 5, 3, dtype=torch.bool)}),
    "SemiMarkov.sum": (SemiMarkov(LogSemiring).sum, {"log_potentials": EDGES}),
    "SemiMarkov.score": (SemiMarkov(LogSemiring).score, {"potentials": EDGES, "parts": PARTS}),
    "to_parts": (SemiMarkov.to_parts, {"sequence": LABELS, "extra": (3, 3), "lengths": LENGTHS}),
    "from_parts": (SemiMarkov.from_parts, {"edge": PARTS}),
    "hsmm": (
        SemiMarkov.hsmm,
        {
            "init": torch.zeros(1),
            "trans_z": torch.zeros(1, 1),
            "trans_l": torch.zeros(1, 3),
            "emission": torch.zeros(1, 4, 3, 1),
        },
    ),
    "BandedMatrix": (BandedMatrix, {"data": torch.zeros(1, 3, 3), "lu": 1, "ld": 1}),
    "banded": (BandedMatrix.from_dense, {"dense": torch.zeros(3, 3), "lu": 1, "ld": 1}),
    "BlockTriangularMatrix": (
        BlockTriangularMatrix,
        {"values": BLOCKS.values, "block_indices": BLOCKS.block_indices, "K": 2, "C": 2},
    ),
    "block-triangular": (
        BlockTriangularMatrix.from_dense,
        {
            "dense": torch.zeros(4, 4),
            "K": 2,
            "C": 2,
            "span": 2,
            "duration_mask": torch.ones(2, 2, dtype=torch.bool),
        },
    ),
    "bandwidth": (measure_effective_bandwidth, {"adj": torch.zeros(3, 3)}),
    "ordering": (rcm_ordering_from_adjacency, {"adj": torch.zeros(3, 3)}),
    "permutation": (
        apply_permutation,
        {"potentials": torch.zeros(3, 3), "perm": torch.arange(3)},
    ),
    "head.compute_loss": (HEAD.compute_loss, {**HIDDEN, "labels": LABELS}),
    "head.potentials": (HEAD.potentials, HIDDEN),
    "head.entropy": (HEAD.compute_entropy_streaming, HIDDEN),
    "head.boundaries": (HEAD.compute_boundary_marginals, HIDDEN),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_lists_given_for_tensors_are_named(name):
    call, arguments = CALLS[name]
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor):
            for other in (value.numpy(), value.tolist()):
                message = message_of(TypeError, call, **{**arguments, argument: other})
                assert message.startswith(f"`{argument}` must be a Tensor")
                assert message.endswith(f"got {type(other).__name__}.")


def test_a_mask_in_lists_is_not_read_as_positions():
    assert message_of(TypeError, constrained, boundaries=[[True] * 5] * 2) == (
        "`boundaries` must hold integers; got [True] in sequence 0."
    )


def test_segments_of_other_forms_are_named():
    message = message_of(TypeError, segments_to_table, [[(0, 3, 1)]])
    assert message == "`segments` must hold Segment objects; got tuple in sequence 0."
    message = message_of(TypeError, SemiCRFDistribution(PROBLEM).log_prob, LABELS.numpy())
    assert message == (
        "`value` must be labels in a Tensor, a SegmentTable or lists of Segment; got ndarray."
    )


# Columns of a table

COLUMNS = {
    "dtype": ({"stop": TABLE.stop.int()}, TypeError, ".stop` must have dtype int64; got torch.int"),
    "floats": ({"start": TABLE.start.double()}, TypeError, ".start` must have dtype int64; got "),
    "an array": ({"label": TABLE.label.numpy()}, TypeError, ".label` must be a Tensor; got ndar"),
    "length": ({"label": TABLE.label[1:]}, ValueError, " must have one shape (N,); got (6,) for "),
    "axes": ({"sequence": TABLE.sequence[None]}, ValueError, " must have one shape (N,); got (1, "),
    "device": ({"start": TABLE.start.to("meta")}, ValueError, ".start` must be on the device of "),
}
READERS = {
    "segment_probabilities": ("`table", lambda table: segment_probabilities(PROBLEM, table)),
    "compute_loss": ("`table", lambda table: HEAD.compute_loss(SCORES, LENGTHS, table)),
    "constraints": ("`segments", lambda table: constrained(segments=table)),
    "log_prob": ("`value", lambda table: SemiCRFDistribution(PROBLEM).log_prob(table)),
}


@pytest.mark.parametrize("bad", COLUMNS)
@pytest.mark.parametrize("reader", READERS)
def test_columns_of_tables_are_checked(reader, bad):
    if (reader, bad) == ("log_prob", "device"):
        pytest.skip("log_prob moves a table to the device of the scores")
    (name, read), (change, kind, part) = READERS[reader], COLUMNS[bad]
    message = message_of(kind, read, TABLE._replace(**change))
    assert part in message and name in message


# Numbers

HUGE = 2**70
SIZES = {
    "n": lambda value: n_best(PROBLEM, value),
    "num_samples": lambda value: sample(PROBLEM, value, 0),
    "sample_shape": lambda value: SemiCRFDistribution(PROBLEM).sample((value,)),
    "k": KMaxSemiring,
    "num_classes": lambda value: SemiMarkovCRFHead(value, 2),
    "max_duration": lambda value: LearnedDuration(value, 2),
    "hidden_dim": lambda value: SemiMarkovCRFHead(2, 2, value),
    "K": lambda value: semi_crf_streaming_forward(**{**CUMULATIVE, "K": value}),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_reason_are_named(name):
    assert message_of(ValueError, SIZES[name], HUGE) == (
        f"`{name}` must be at most 2147483647; got {HUGE}."
    )
    assert message_of(ValueError, SIZES[name], True) == (
        f"`{name}` must be an integer >= 1; got True."
    )


NUMBERS = {
    "init_scale": (lambda value: SemiMarkovCRFHead(2, 2, init_scale=value), "finite and >= 0"),
    "edge_memory_threshold": (
        lambda value: SemiMarkovCRFHead(2, 2, edge_memory_threshold=value),
        "> 0",
    ),
    "memory_limit": (lambda value: SemiMarkov(LogSemiring, value), "> 0"),
    "p": (HEAD.parameter_penalty, "> 0"),
    "uncertainty_weight": (
        lambda value: HEAD.compute_loss_uncertainty_weighted(SCORES, LENGTHS, LABELS, value),
        "finite and >= 0",
    ),
}


@pytest.mark.parametrize("value", ["3", None, True, -1.0, float("nan")])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_named(name, value):
    call, wanted = NUMBERS[name]
    assert message_of(ValueError, call, value) == f"`{name}` must be {wanted}; got {value!r}."


@pytest.mark.parametrize("value", [HUGE, 1.5, "-100", True])
def test_ignore_index_is_an_integer(value):
    message = f"`ignore_index` must be an integer of 64 bits; got {value!r}."
    loss = HEAD.compute_loss
    assert message_of(ValueError, loss, SCORES, LENGTHS, LABELS, ignore_index=value) == message
    known = Constraints(labels=LABELS, ignore_index=value)
    assert message_of(ValueError, viterbi, PROBLEM, constraints=known) == message


def test_numpy_integers_are_integers():
    assert KMaxSemiring(np.int64(3)).size == 3
    assert len(n_best(PROBLEM, np.int64(2)).segments[0]) == 2
