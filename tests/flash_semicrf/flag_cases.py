"""What bad values do where nothing is read, the same for every backend and device."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from flash_semicrf import log_partition, segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import BY_POSITION, Potentials
from tests.flash_semicrf.cases import gradients_of, with_gradients

BAD = 1
"""Sequence of the batch that is spoilt."""


def with_bad_value(problem: Potentials, name: str, value: float) -> Potentials:
    """The problem with a value in the last position of a sequence, or in a shared parameter."""
    changed = getattr(problem, name).clone()
    if name in BY_POSITION:
        changed[BAD, int(problem.lengths[BAD]) - 1, -1] = value
    else:
        changed.view(-1)[-1] = value
    return problem.replace(**{name: changed})


def with_length(problem: Potentials, length: int) -> Potentials:
    """The problem with another length of a sequence."""
    lengths = problem.lengths.clone()
    lengths[BAD] = length
    return problem.replace(lengths=lengths)


def with_bad_padding(problem: Potentials) -> Potentials:
    """The problem with NaN after the end of every sequence."""
    outside = torch.arange(problem.num_positions, device=problem.device) >= problem.lengths[:, None]
    given = {n: v for n, v in problem.parameters().items() if n in BY_POSITION}
    return problem.replace(
        **{n: v.masked_fill(outside[..., None], math.nan) for n, v in given.items()}
    )


def assert_bad_sequence_is_nan(good: Potentials, spoilt: Potentials, backend: str) -> None:
    """Every result of one sequence is NaN, and those of the others are as without it."""
    others = torch.arange(good.batch_size, device=good.device) != BAD
    length = int(good.lengths[BAD])
    found, expected = with_gradients(spoilt), with_gradients(good)
    log_z = log_partition(found, backend, validate="shapes")
    whole = log_partition(expected, backend, validate="shapes")
    assert torch.equal(log_z.isnan(), ~others)
    assert_close(log_z[others], whole[others])

    for name, gradient in gradients_of(log_z.sum(), found).items():
        if name in BY_POSITION:
            assert bool(gradient[BAD, :length].isnan().all())
            assert bool(gradient[others].isfinite().all())
        else:
            assert bool(gradient.isnan().all())

    # A weight of 0 excludes the sequence.
    log_z = log_partition(found, backend, validate="shapes")
    used = gradients_of(whole[others].sum(), expected)
    for name, gradient in gradients_of(log_z[others].sum(), found).items():
        assert_close(gradient, used[name])

    marginals = segment_marginals(spoilt, backend, validate="shapes")
    for value, usual in zip(marginals, segment_marginals(good, backend), strict=True):
        if value is not None and usual.any():
            assert bool(value[BAD].isnan().all())
            assert_close(value[others], usual[others])

    scores, table = viterbi_table(spoilt, backend, validate="shapes")
    best, segments = viterbi_table(good, backend)
    assert bool(scores[BAD].isnan())
    assert_close(scores[others], best[others])
    kept = segments.sequence != BAD
    for column, usual in zip(table, segments, strict=True):
        assert torch.equal(column, usual[kept])


def assert_all_is_nan(spoilt: Potentials, backend: str) -> None:
    """Every log Z, gradient, marginal and best score is NaN, and there are no segments."""
    found = with_gradients(spoilt)
    log_z = log_partition(found, backend, validate="shapes")
    assert bool(log_z.isnan().all())
    inside = torch.arange(spoilt.num_positions, device=spoilt.device) < spoilt.lengths[:, None]
    for name, gradient in gradients_of(log_z.sum(), found).items():
        seen = gradient[inside] if name in BY_POSITION else gradient
        assert bool(seen.isnan().all())
    marginals = segment_marginals(spoilt, backend, validate="shapes")
    assert bool(marginals.start.isnan().all())
    scores, table = viterbi_table(spoilt, backend, validate="shapes")
    assert bool(scores.isnan().all()) and len(table.sequence) == 0


def assert_padding_is_ignored(problem: Potentials, backend: str) -> None:
    """Log Z is that without NaN in the padding."""
    log_z = log_partition(with_bad_padding(problem), backend, validate="shapes")
    assert_close(log_z, log_partition(problem, backend, validate="shapes"))
