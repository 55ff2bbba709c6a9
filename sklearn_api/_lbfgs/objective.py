"""The training objective of the linear model, and its gradient, over all sequences at once.

    f = (sum_i -log P(y_i | x_i) + alpha ((1 - r) / 2 |w|^2 + r |w|_1)) / N

for N positions. An iteration is one product with X, one pass of the CPU kernels and one product
with X^T; only the durations, whose parameters belong to a module, go through autograd. f is convex
in W, b, the transitions, the scores of the first and last label, "learned" durations and the
log-rates of a tail.

Variables are scaled by an estimate of the curvature of each (a diagonal preconditioner): features
that are frequent and features seen once then need steps of the same size.
"""

from __future__ import annotations

import numpy as np
import torch

from sklearn_api._lbfgs.likelihood import LinearLikelihood
from sklearn_api._lbfgs.vectors import penalised, scaled

__all__ = ["LinearObjective"]

_CURVATURE = 0.005
"""Variance of the indicator of a label at a position, near the optimum; it is at most 1/4."""


class LinearObjective:
    """Smooth part of the objective, as a function of one vector of scaled variables.

    Parameters
    ----------
    likelihood : LinearLikelihood
        Its head's parameters are written.
    anchors : list of Tensor
        Value that each parameter of the durations is drawn towards.
    num_segments : int
        Gold segments.
    alpha, l1_ratio : float

    Attributes
    ----------
    scale : ndarray of shape (n,)
        Parameter per variable.
    l1 : ndarray of shape (n,) or None
        Weight of each variable in the L1 part; None where it is absent.
    """

    def __init__(
        self,
        likelihood: LinearLikelihood,
        anchors: list[torch.Tensor],
        num_segments: int,
        alpha: float,
        l1_ratio: float,
    ) -> None:
        self.likelihood, self.head, self.alpha = likelihood, likelihood.head, alpha
        self.features, self.dtype = likelihood.features, likelihood.row_weights.dtype
        self.num_positions, self.num_outputs = likelihood.num_positions, likelihood.num_outputs
        pairs = zip(self.head.duration_distribution.parameters(), anchors, strict=True)
        learnt = [(parameter, anchor) for parameter, anchor in pairs if parameter.requires_grad]
        self.num_drawn = len(learnt)  # the tail's own rate is free
        if self.head.tail is not None:
            rates = [p for p in self.head.tail.parameters() if p.requires_grad]
            learnt += [(rate, rate.detach().clone()) for rate in rates]
        self.durations = [parameter for parameter, _ in learnt]
        self.finite = [anchor.isfinite() for _, anchor in learnt]
        self.anchors = [torch.where(anchor.isfinite(), anchor, 0.0) for _, anchor in learnt]
        self._lay_out(alpha, l1_ratio, num_segments)

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
            penalty = (l2, alpha * l1_ratio) if i < self.num_drawn else (0.0, 0.0)
            blocks.append((f"duration {i}", tuple(parameter.shape), shared, *penalty))
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
        scores = self.set_parameters(self.likelihood, parameters)
        loss, expected, slopes = self.likelihood.gradients(scores)
        gradients = {"bias": slopes.sum(0, dtype=np.float64), **expected}
        gradients |= self._duration_gradients(expected)
        gradient = np.empty_like(x)
        for name, (where, shape) in self.layout.items():
            if name == "weight":
                self.features.transposed_product(slopes, gradient[where].reshape(shape))
            else:
                gradient[where] = gradients[name].ravel()
        penalty = penalised(gradient, parameters, self.scale, self.l2, 1 / self.num_positions)
        return loss / self.num_positions + 0.5 * penalty, gradient

    def set_parameters(self, likelihood: LinearLikelihood, parameters: np.ndarray) -> np.ndarray:
        """Scores (N, P) of a likelihood, once everything else is written into the head."""
        values = self._values(parameters)
        self._set_small(values)
        return likelihood.scores(values["weight"], values["bias"])

    def held_out_loss(self, held_out: LinearLikelihood, x: np.ndarray) -> float:
        """Loss per position of other sequences, with the penalty of the training sequences.

        Parameters
        ----------
        held_out : LinearLikelihood
            Of the same head, its features reduced by the training features.
        x : ndarray of shape (n,)
        """
        parameters = scaled(x, self.scale)
        loss = held_out.loss(self.set_parameters(held_out, parameters)) / held_out.num_positions
        penalty = 0.5 * float(np.vdot(self.l2 * parameters, parameters))
        return loss + penalty + (0.0 if self.l1 is None else float(np.abs(x) @ self.l1))

    def _duration_gradients(self, slopes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gradient by the parameters of the durations, through their modules."""
        if not self.durations:
            return {}
        total = torch.zeros((), dtype=torch.float64)
        for name in ("duration_bias", "duration_tail"):
            if name in slopes:
                value = getattr(self.head, name)
                finite = torch.where(value.isfinite(), value, 0.0)
                total = total + (finite * torch.from_numpy(slopes[name])).sum()
        found = torch.autograd.grad(total, self.durations, allow_unused=True)
        return {
            f"duration {i}": np.zeros(tuple(p.shape)) if g is None else g.numpy()
            for i, (p, g) in enumerate(zip(self.durations, found, strict=True))
        }
