"""The training objective of the linear model, and its gradient, over all sequences at once.

    f = (sum_i -log P(y_i | x_i) + alpha ((1 - r) / 2 |w|^2 + r |w|_1)) / N

for N positions, with the scores ``X W + b`` of labels at positions and, with boundary scores, of
segments that start and end there. Its gradient by the scores is the posterior marginals less the
gold segmentation, so an iteration is one product with X, one pass of the CPU kernels and one
product with X^T; only the durations, whose parameters belong to a module, go through autograd. f is
convex in W, b, the transitions, the scores of the first and last label and "learned" durations.

Variables are scaled by an estimate of the curvature of each (a diagonal preconditioner): features
that are frequent and features seen once then need steps of the same size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.potentials import Potentials
from flash_semicrf.segments import SegmentTable, covered_positions
from flash_semicrf.streaming.dispatch import choose
from sklearn_api.solvers.features import FeatureMatrix
from sklearn_api.solvers.vectors import penalised, scaled

__all__ = ["LinearObjective"]

_POSITIONS_PER_CALL = 1 << 16
_MOST_PADDING, _FREE_PADDING = 1.1, 1024  # relative, and in positions
_CURVATURE = 0.005
"""Variance of the indicator of a label at a position, near the optimum; it is at most 1/4."""


class _Group(NamedTuple):
    """Sequences of similar length from the one numbered `first`, in rows ``[begin, stop)``."""

    first: int
    begin: int
    stop: int
    lengths: np.ndarray


class LinearObjective:
    """Smooth part of the objective, as a function of one vector of scaled variables.

    Parameters
    ----------
    head : SemiMarkovCRFHead
        With a projection, initial and final scores; in float64, on the CPU.
    anchors : list of Tensor
        Value that each parameter of the durations is drawn towards.
    features : FeatureMatrix
        Positions of the sequences one after the other, the sequences sorted by length.
    lengths : int64 ndarray of shape (n_sequences,)
        Ascending.
    table : SegmentTable
        Gold segments, ordered by sequence in the order of `lengths`.
    alpha, l1_ratio : float
    weights : float64 ndarray of shape (n_sequences,)
        Of the sequences' likelihoods.
    dtype : numpy dtype
        Of the variables and products. Sums over a sequence are float64 either way.

    Attributes
    ----------
    scale : ndarray of shape (n,)
        Parameter per variable.
    l1 : ndarray of shape (n,) or None
        Weight of each variable in the L1 part; None where it is absent.
    """

    def __init__(
        self,
        head: SemiMarkovCRFHead,
        anchors: list[torch.Tensor],
        features: FeatureMatrix,
        lengths: np.ndarray,
        table: SegmentTable,
        alpha: float,
        l1_ratio: float,
        weights: np.ndarray,
        dtype: Any,
    ) -> None:
        self.head, self.features, self.dtype = head, features, np.dtype(dtype)
        self.num_positions = int(lengths.sum())
        self.groups = _groups(lengths)
        self.weights = weights
        self.row_weights = np.repeat(weights, lengths).astype(self.dtype)[:, None]
        pairs = zip(head.duration_distribution.parameters(), anchors, strict=True)
        learnt = [(parameter, anchor) for parameter, anchor in pairs if parameter.requires_grad]
        self.durations = [parameter for parameter, _ in learnt]
        self.finite = [anchor.isfinite() for _, anchor in learnt]
        self.anchors = [torch.where(anchor.isfinite(), anchor, 0.0) for _, anchor in learnt]
        self.num_outputs = head.num_classes * (1 if head.boundary_projection is None else 3)
        self._count_gold(lengths, table)
        self._lay_out(alpha, l1_ratio, len(table.start))

    def _count_gold(self, lengths: np.ndarray, table: SegmentTable) -> None:
        """Where the gold segmentation says 1, and how often it uses each parameter."""
        num_labels, longest = self.head.num_classes, self.head.max_duration
        offset = torch.from_numpy(np.cumsum(lengths) - lengths)
        sequence, start, stop, label = table
        owner, position, row = covered_positions(table)
        cells = [(offset[owner] + position) * self.num_outputs + label[row]]
        if self.head.boundary_projection is not None:
            begin = offset[sequence] * self.num_outputs + label
            cells.append(begin + start * self.num_outputs + num_labels)
            cells.append(begin + (stop - 1) * self.num_outputs + 2 * num_labels)
        self.gold = torch.cat(cells).numpy()
        first, last = start == 0, stop == torch.from_numpy(lengths)[sequence]
        pairs = table.label[:-1] * num_labels + table.label[1:]
        inner = torch.nonzero(~first)[:, 0]
        pairs = pairs[inner - 1]

        weight = torch.from_numpy(self.weights)[sequence]
        self.gold_weights = self.row_weights[self.gold // self.num_outputs, 0]

        def count(index: torch.Tensor, rows: Any, *shape: int) -> np.ndarray:
            found = torch.bincount(index, weight[rows], minlength=int(np.prod(shape)))
            return found.reshape(shape).numpy()

        self.gold_counts = {
            "transition": count(pairs, inner, num_labels, num_labels),
            "initial_scores": count(label[first], first, num_labels),
            "final_scores": count(label[last], last, num_labels),
            "duration_bias": count(
                (stop - start - 1) * num_labels + label, slice(None), longest, num_labels
            ),
        }

    def _lay_out(self, alpha: float, l1_ratio: float, num_segments: int) -> None:
        """Slices of the vector, its scale and its penalties."""
        num_labels, outputs = self.head.num_classes, self.num_outputs
        l2 = alpha * (1 - l1_ratio)
        multiplicity = np.repeat(self.features.multiplicity, outputs)
        shared = _CURVATURE * num_segments / num_labels
        blocks = [
            # name, shape, curvature, L2 weight, L1 weight
            (
                "weight",
                (self.features.num_columns, outputs),
                np.repeat(_CURVATURE * self.features.squares, outputs),
                l2,
                alpha * l1_ratio * np.sqrt(multiplicity),
            ),
            ("bias", (outputs,), _CURVATURE * self.num_positions, 0.0, 0.0),
            ("transition", (num_labels, num_labels), shared, l2, alpha * l1_ratio),
            ("initial_scores", (num_labels,), shared, 0.0, 0.0),
            ("final_scores", (num_labels,), shared, 0.0, 0.0),
        ]
        for i, parameter in enumerate(self.durations):
            blocks.append((f"duration {i}", tuple(parameter.shape), shared, l2, alpha * l1_ratio))
        sizes = [int(np.prod(shape)) for _, shape, *_ in blocks]
        stops = np.cumsum(sizes)
        self.layout = {
            name: (slice(stop - size, stop), shape)
            for (name, shape, *_), size, stop in zip(blocks, sizes, stops, strict=True)
        }
        total = int(stops[-1])
        self.l2 = np.empty(total, self.dtype)
        scale, l1 = np.empty(total), np.empty(total)
        for name, _, curvature, quadratic, absolute in blocks:
            where = self.layout[name][0]
            scale[where] = np.sqrt(self.num_positions / (curvature + quadratic + 1.0))
            self.l2[where] = quadratic / self.num_positions
            l1[where] = absolute / self.num_positions * scale[where]
        self.scale = scale.astype(self.dtype)
        self.l1 = l1.astype(self.dtype) if alpha * l1_ratio > 0 else None

    # Between the head's parameters and the vector

    def pack(self) -> np.ndarray:
        """Variables of the head's current parameters."""
        head, values = self.head, {}
        layers = [head.projection, head.boundary_projection]
        layers = [layer for layer in layers if layer is not None]
        weight = torch.cat([layer.weight.detach() for layer in layers]).T.numpy()
        values["weight"] = self.features.merge(weight.astype(self.dtype))
        values["bias"] = torch.cat([layer.bias.detach() for layer in layers]).numpy()
        for name in ("transition", "initial_scores", "final_scores"):
            values[name] = getattr(head, name).detach().numpy()
        for i, (parameter, anchor) in enumerate(zip(self.durations, self.anchors, strict=True)):
            offset = torch.where(self.finite[i], parameter.detach() - anchor, 0.0)
            values[f"duration {i}"] = offset.numpy()
        x = np.empty(len(self.scale), self.dtype)
        for name, (where, _) in self.layout.items():
            x[where] = values[name].ravel()
        return x / self.scale

    def unpack(self, x: np.ndarray) -> None:
        """Write the parameters that variables stand for into the head."""
        head, values = self.head, self._values(x * self.scale)
        num_labels = head.num_classes
        weight = torch.from_numpy(self.features.expand(values["weight"])).T
        bias = torch.from_numpy(values["bias"])
        with torch.no_grad():
            head.projection.weight.copy_(weight[:num_labels])
            head.projection.bias.copy_(bias[:num_labels])
            if head.boundary_projection is not None:
                head.boundary_projection.weight.copy_(weight[num_labels:])
                head.boundary_projection.bias.copy_(bias[num_labels:])
        self._set_small(values)

    def _values(self, parameters: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: parameters[where].reshape(shape) for name, (where, shape) in self.layout.items()
        }

    def _set_small(self, values: dict[str, np.ndarray]) -> None:
        """Write everything but the projections into the head."""
        with torch.no_grad():
            for name in ("transition", "initial_scores", "final_scores"):
                getattr(self.head, name).copy_(torch.from_numpy(values[name]))
            for i, (parameter, anchor) in enumerate(zip(self.durations, self.anchors, strict=True)):
                moved = anchor + torch.from_numpy(values[f"duration {i}"])
                parameter.copy_(torch.where(self.finite[i], moved, parameter))

    # The objective

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Smooth part of the objective per position, and its gradient."""
        parameters = scaled(x, self.scale)
        values = self._values(parameters)
        self._set_small(values)
        scores = self.features.product(values["weight"])
        scores += values["bias"]
        terms = scores.ravel()[self.gold] * self.gold_weights
        gold_score = float(terms.sum(dtype=np.float64))
        bias = self.head.duration_bias
        loss, expected, slopes = self._infer(scores, bias.detach())
        small = {"duration_bias": torch.where(bias.isfinite(), bias, 0.0).detach().numpy()}
        small |= {name: values[name] for name in expected if name in values}
        for name, counts in self.gold_counts.items():
            gold_score += float((counts * small[name].astype(np.float64)).sum())
            expected[name] -= counts
        slopes.ravel()[self.gold] -= 1
        slopes *= self.row_weights
        gradients = {"bias": slopes.sum(0, dtype=np.float64), **expected}
        gradients |= self._duration_gradients(bias, expected["duration_bias"])
        gradient = np.empty_like(x)
        for name, (where, shape) in self.layout.items():
            if name == "weight":
                self.features.transposed_product(slopes, gradient[where].reshape(shape))
            else:
                gradient[where] = gradients[name].ravel()
        penalty = penalised(gradient, parameters, self.scale, self.l2, 1 / self.num_positions)
        return (loss - gold_score) / self.num_positions + 0.5 * penalty, gradient

    def _infer(
        self, scores: np.ndarray, bias: torch.Tensor
    ) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
        """Sum of log Z, expected counts of the parameters, and marginals (N, P)."""
        head, num_labels = self.head, self.head.num_classes
        names = ("scores", "start_scores", "end_scores")[: self.num_outputs // num_labels]
        shared = {
            "transition": head.constrained_transition.detach(),
            "duration_bias": bias,
            "initial_scores": head.initial_scores.detach(),
            "final_scores": head.final_scores.detach(),
        }
        shared = {name: value.to(torch.from_numpy(scores).dtype) for name, value in shared.items()}
        total, slopes = 0.0, np.empty_like(scores)
        expected = {name: np.zeros(tuple(value.shape)) for name, value in shared.items()}
        for group in self.groups:
            rows = slice(group.begin, group.stop)
            inside = np.arange(group.lengths[-1]) < group.lengths[:, None]
            given = {}
            for i, name in enumerate(names):
                padded = np.zeros((*inside.shape, num_labels), scores.dtype)
                padded[inside] = scores[rows, i * num_labels : (i + 1) * num_labels]
                given[name] = torch.from_numpy(padded)
            problem = Potentials(lengths=torch.from_numpy(group.lengths), **given, **shared)
            log_z, found = choose("auto", problem).gradients(problem, {*given, *shared})
            weights = torch.from_numpy(self.weights[group.first : group.first + len(inside)])
            total += float(log_z @ weights)
            for i, name in enumerate(names):
                columns = slice(i * num_labels, (i + 1) * num_labels)
                slopes[rows, columns] = found[name].numpy()[inside]
            for name in expected:
                expected[name] += torch.tensordot(weights, found[name].double(), 1).numpy()
        return total, expected, slopes

    def _duration_gradients(self, bias: torch.Tensor, slope: np.ndarray) -> dict[str, np.ndarray]:
        """Gradient by the parameters of the durations, through their module."""
        if not self.durations:
            return {}
        finite = torch.where(bias.isfinite(), bias, 0.0)
        found = torch.autograd.grad(
            (finite * torch.from_numpy(slope)).sum(), self.durations, allow_unused=True
        )
        return {
            f"duration {i}": np.zeros(tuple(p.shape)) if g is None else g.numpy()
            for i, (p, g) in enumerate(zip(self.durations, found, strict=True))
        }


def _groups(lengths: np.ndarray) -> list[_Group]:
    """Runs of sequences of similar length, each of a bounded number of padded positions."""
    groups, begin, first, real = [], 0, 0, 0
    for i in range(1, len(lengths) + 1):
        real += int(lengths[i - 1])
        if i < len(lengths):
            padded = (i + 1 - first) * int(lengths[i])
            spare = _MOST_PADDING * (real + int(lengths[i])) + _FREE_PADDING
            if padded <= min(spare, _POSITIONS_PER_CALL):
                continue
        groups.append(_Group(first, begin, begin + real, lengths[first:i]))
        begin, first, real = begin + real, i, 0
    return groups
