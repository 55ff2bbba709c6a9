"""Independent and exact samples of segmentations from P(y | x).

After one forward pass, each sample is drawn backwards from the end of its sequence (Scott 2002,
"Bayesian methods for hidden Markov models", JASA 97: forward filtering, backward sampling): the
last label from alpha_T, then the duration of its segment and the label before it, from the terms of
their messages. Cost T(KC + C²) for the pass of a sequence and about k + C for each segment drawn, k
being its duration; with transitions by duration T·K·C² and k·C.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from flash_semicrf.inference.viterbi import check_feasible
from flash_semicrf.problem.constraints import Constraints, constrain, fold_table
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import Segments, SegmentTable, table_to_segments
from flash_semicrf.problem.validation import check_positive_int, check_potentials
from flash_semicrf.streaming.dispatch import choose

__all__ = ["sample", "sample_table"]


def sample(
    potentials: Potentials,
    num_samples: int,
    seed: int | torch.Generator | None = None,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> list[list[Segments]]:
    """Draw segmentations from their distribution.

    Parameters
    ----------
    potentials : Potentials
    num_samples : int
        Samples of each sequence.
    seed : int, torch.Generator or None
        An int fixes the samples: sample j of sequence b depends only on the problem of that
        sequence, the seed, b and j, so the first samples do not change when more samples or
        sequences are added. None draws a seed from torch's default generator, so that
        `torch.manual_seed` fixes it; a generator is used in the same way.
    backend : str
        As for `flash_semicrf.log_partition`. All backends draw the same samples, except where
        rounding decides.
    constraints : Constraints, optional
        Condition on known facts.

    Returns
    -------
    list of list of Segments
        Segments by sequence and sample. Their `score` is 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.

    Examples
    --------
    Scores of zero: the five segmentations of four positions are equally probable.

    >>> problem = Potentials(
    ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    ... )
    >>> drawn = sample(problem, 1000, seed=0)[0]
    >>> ones = sum(len(segments) == 4 for segments in drawn)
    >>> 150 < ones < 250
    True
    """
    table = sample_table(potentials, num_samples, seed, backend, constraints=constraints)
    batch_size = potentials.batch_size
    drawn = table_to_segments(table, num_samples * batch_size)
    return [drawn[b::batch_size] for b in range(batch_size)]


def sample_table(
    potentials: Potentials,
    num_samples: int,
    seed: int | torch.Generator | None = None,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> SegmentTable:
    """Results of `sample` with the segments as tensors.

    Parameters and errors are those of `sample`.

    Returns
    -------
    SegmentTable
        On the device of the scores; its `sequence` is sample * B + b, as for the batch repeated
        `num_samples` times.
    """
    num_samples = check_positive_int("num_samples", num_samples)
    p = check_potentials(potentials)
    seed = _seed_of(seed)
    with torch.no_grad():
        given = constrain(p, constraints)
        table = choose(backend, given).sample(given, num_samples, seed)
    _check_feasible(table, p.batch_size, constraints is not None)
    return table if given is p else fold_table(table, p.num_labels)


def _seed_of(seed: int | torch.Generator | None) -> int:
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return int(torch.randint(2**63 - 1, (1,), generator=seed, device=device))
    if isinstance(seed, (bool, Tensor)) or not hasattr(seed, "__index__"):
        raise TypeError(
            f"`seed` must be an int, a torch.Generator or None; got {type(seed).__name__}."
        )
    return operator.index(seed)


def _check_feasible(table: SegmentTable, batch_size: int, constrained: bool) -> None:
    """Raise ValueError for sequences without a sample, by the rows of sample 0."""
    bounds = torch.arange(batch_size + 1, device=table.sequence.device)
    rows = torch.searchsorted(table.sequence.contiguous(), bounds)
    check_feasible(torch.where(rows[1:] > rows[:-1], 0.0, -torch.inf), constrained)
