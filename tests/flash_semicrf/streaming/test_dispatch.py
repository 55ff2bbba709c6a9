"""Which backend runs, and what is said where one cannot."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.compat import (
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.streaming.dispatch import BACKENDS, choose, record_backends
from flash_semicrf.testing import random_problem


def on_meta(**options):
    """A problem on a device that has neither numbers nor kernels."""
    problem = random_problem(**options).to("meta")
    return problem.replace(lengths=problem.lengths.to("meta"))


def forward(problem, **options):
    return semi_crf_streaming_forward(*_cumulative(problem), **options)


def back_pointers(problem, **options):
    return semi_crf_streaming_viterbi_with_backpointers(*_cumulative(problem), **options)


def _cumulative(problem):
    cum_scores = torch.nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))
    shared = (problem.transition, problem.duration_bias, problem.lengths)
    return cum_scores, *shared, problem.max_duration


ENTRIES = [log_partition, viterbi, viterbi_table, segment_marginals, forward, back_pointers]


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_auto_runs_numba_on_the_cpu(entry, by_duration):
    with record_backends() as ran:
        entry(random_problem(by_duration=by_duration))
    assert ran == ["numba"]


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_named_backend_runs(entry, backend):
    with record_backends() as ran:
        entry(random_problem(), backend=backend)
    assert ran == [backend]


def test_a_named_backend_runs_under_autograd():
    problem = random_problem()
    scores = problem.scores.requires_grad_()
    for backend in ("numba", "reference"):
        with record_backends() as ran:
            log_partition(problem.replace(scores=scores), backend).sum().backward()
        assert ran == [backend]


def test_use_triton_changes_nothing_on_the_cpu():
    problem = random_problem()
    with record_backends() as ran:
        with_kernels = forward(problem, use_triton=True)
        without = forward(problem, use_triton=False)
    assert ran == ["numba", "numba"]
    assert torch.equal(with_kernels, without)


@pytest.mark.parametrize("name", ["cuda", "NUMBA", "", None, 3], ids=repr)
def test_unknown_names_are_refused_with_the_choices(name):
    with pytest.raises(ValueError) as error:
        choose(name, random_problem())
    choices = ", ".join(repr(known) for known in ("auto", *BACKENDS))
    assert str(error.value) == f"`backend` must be one of {choices}; got {name!r}."


def test_numba_says_why_not_on_another_device():
    with pytest.raises(ValueError) as error:
        choose("numba", on_meta())
    assert str(error.value) == (
        'backend="numba" cannot run this problem: it needs tensors on the CPU and these are on '
        "meta."
    )


def test_auto_takes_the_reference_where_there_are_no_kernels():
    assert choose("auto", on_meta()).name == "reference"


def test_backends_are_ordered_and_named_as_they_are_registered():
    assert list(BACKENDS)[-1] == "reference"
    assert list(BACKENDS)[0] == "numba"
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_a_refused_backend_is_not_recorded():
    with record_backends() as ran:
        with pytest.raises(ValueError):
            choose("numba", on_meta())
    assert ran == []


def test_records_do_not_nest_and_end_with_their_block():
    problem = random_problem()
    with record_backends() as outer:
        log_partition(problem)
        with record_backends() as inner:
            log_partition(problem, "reference")
        viterbi(problem)
    log_partition(problem)
    assert (outer, inner) == (["numba", "numba"], ["reference"])
