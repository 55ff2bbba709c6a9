"""Traces and transforms of PyTorch: refused where they would be wrong, at every public entry.

Models that are compiled or exported: ``test_operators.py``.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vmap

from flash_semicrf import (
    SemiCRFDistribution,
    SemiMarkov,
    UncertaintySemiMarkovCRFHead,
    log_partition,
    minimum_risk,
    n_best,
    sample,
    segment_marginals,
    viterbi,
    viterbi_labels,
)
from flash_semicrf.compat import (
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.inference.information import entropy
from flash_semicrf.semirings import LogSemiring, MaxSemiring
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import message_of

PROBLEM = random_problem()
LENGTHS = PROBLEM.lengths
SCORES = PROBLEM.scores
CUMULATIVE = torch.nn.functional.pad(SCORES.cumsum(1), (0, 0, 1, 0))
EDGES = torch.zeros(2, 3, 3, 2, 2)


def of_scores(entry):
    return lambda scores: entry(PROBLEM.replace(scores=scores))


def of_cumulative(entry):
    shared = (PROBLEM.transition, PROBLEM.duration_bias, LENGTHS, PROBLEM.max_duration)
    return lambda scores: entry(scores, *shared)


def of_head(method):
    head = UncertaintySemiMarkovCRFHead(PROBLEM.num_labels, 3).requires_grad_(False)
    return lambda scores: getattr(head, method)(scores, LENGTHS)


ENTRIES = {
    "log_partition": (of_scores(log_partition), SCORES),
    "viterbi": (of_scores(lambda p: viterbi(p).scores), SCORES),
    "viterbi_labels": (of_scores(lambda p: viterbi_labels(p)[0]), SCORES),
    "n_best": (of_scores(lambda p: n_best(p, 2).scores), SCORES),
    "minimum_risk": (of_scores(lambda p: minimum_risk(p).scores), SCORES),
    "sample": (of_scores(lambda p: sample(p, 1)), SCORES),
    "segment_marginals": (of_scores(lambda p: segment_marginals(p).position), SCORES),
    "entropy": (of_scores(entropy), SCORES),
    "distribution": (of_scores(SemiCRFDistribution), SCORES),
    "forward": (of_cumulative(semi_crf_streaming_forward), CUMULATIVE),
    "back-pointers": (
        of_cumulative(lambda *x: semi_crf_streaming_viterbi_with_backpointers(*x)[0]),
        CUMULATIVE,
    ),
    "head": (of_head("forward"), SCORES),
    "head.decode": (of_head("decode"), SCORES),
    "head.decode_labels": (of_head("decode_labels"), SCORES),
    "head.decode_with_traceback": (of_head("decode_with_traceback"), SCORES),
    "head.marginals": (of_head("marginals"), SCORES),
    "head.entropy": (of_head("compute_entropy_exact"), SCORES),
    "exact sum": (SemiMarkov(MaxSemiring).sum, EDGES),
    "exact marginals": (SemiMarkov(LogSemiring).marginals, EDGES),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_traces_and_transforms_are_refused(name):
    call, value = ENTRIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.trace itself
        traced = message_of(RuntimeError, torch.jit.trace, call, (value,))
    assert traced.startswith("flash_semicrf cannot be traced or exported: ")
    mapped = message_of(RuntimeError, vmap(call), value[None])
    assert mapped.startswith("flash_semicrf does not support the transforms of torch.func ")


@pytest.mark.parametrize("name", ENTRIES)
def test_results_are_where_the_input_is_whatever_the_default_device(name):
    call, value = ENTRIES[name]
    torch.manual_seed(0)
    expected = call(value)
    torch.manual_seed(0)
    with torch.device("meta"):  # a tensor made without a device would have no data
        found = call(value)
    if isinstance(expected, dict):
        expected, found = expected["partition"], found["partition"]
    if isinstance(expected, torch.Tensor):
        assert_close(found, expected)


@pytest.mark.parametrize("transform", [grad, jacrev])
def test_transforms_that_differentiate_are_refused(transform):
    message = message_of(
        RuntimeError, transform(lambda x: ENTRIES["head"][0](x)["partition"]), SCORES
    )
    assert "torch.autograd.grad()" in message


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_derivatives_are_refused(grad_mode):
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        scores = forward_ad.make_dual(SCORES, SCORES)
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            log_partition(PROBLEM.replace(scores=scores))


def test_functional_call_is_supported():
    head = UncertaintySemiMarkovCRFHead(PROBLEM.num_labels, 3)
    other = UncertaintySemiMarkovCRFHead(PROBLEM.num_labels, 3)
    swapped = functional_call(head, dict(other.named_parameters()), (SCORES, LENGTHS))
    assert_close(swapped["partition"], other(SCORES, LENGTHS)["partition"])
