"""Encoder and CRF head as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_semicrf.duration import DurationDistribution
from flash_semicrf.nn import SemiMarkovCRFHead
from sklearn_api._model.sparse import project_sparse
from sklearn_api.encoders import Standardize

__all__ = ["SegmentationModule", "core_rows"]


class SegmentationModule(nn.Module):
    """Encoder and semi-Markov CRF head.

    Parameters
    ----------
    encoder : nn.Module
        Called as ``encoder(x, lengths)``.
    head : SemiMarkovCRFHead
    standardize : Standardize, optional
        Applied to the features first.
    """

    def __init__(
        self, encoder: nn.Module, head: SemiMarkovCRFHead, standardize: Standardize | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.standardize = standardize
        self._penalized = self._anchor()

    def _anchor(self) -> list[tuple[str, str | None]]:
        """Names of the penalised parameters, each with the buffer that holds its prior mean.

        Weights and transitions are drawn towards 0, durations towards where they start; biases,
        scales and the scores of the first and last label are free.
        """
        durations = set()
        for module in self.head.modules():
            if isinstance(module, DurationDistribution):
                durations.update(id(p) for p in module.parameters())
        penalized: list[tuple[str, str | None]] = []
        for name, parameter in list(self.named_parameters()):
            if id(parameter) in durations:
                anchor = f"anchor_{len(penalized)}"
                self.register_buffer(anchor, parameter.detach().clone())
                penalized.append((name, anchor))
            elif parameter.dim() >= 2:
                penalized.append((name, None))
        return penalized

    def duration_anchors(self) -> list[Tensor]:
        """Prior means of the durations' parameters, in the order of the distribution's."""
        return [getattr(self, anchor) for _, anchor in self._penalized if anchor is not None]

    def forward(self, x: Tensor, lengths: Tensor, crop: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, H) of features (B, T, D); scores (B, T, P) of sparse features.

        The first two columns of `crop` count the positions on either side that are context only;
        `lengths` does not count them and the result does not hold them.
        """
        if x.is_sparse:
            return project_sparse(self.head, x)
        if self.standardize is not None:
            x = self.standardize(x).to(self.head.transition.dtype)
        if crop is None:
            return self.encoder(x, lengths)
        hidden = self.encoder(x, lengths + crop[:, 0] + crop[:, 1])
        return core_rows(hidden, crop[:, 0], lengths)

    def penalty(self) -> Tensor:
        """Half the squared distance of the penalised parameters from their prior means."""
        parameters = dict(self.named_parameters())
        total = torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
        for name, anchor in self._penalized:
            value = parameters[name]
            if anchor is not None:
                mean = getattr(self, anchor)
                # A forbidden duration stays at -inf: it has no distance from itself.
                value = torch.where(torch.isfinite(mean), value - mean, 0.0)
            total = total + 0.5 * value.square().sum(dtype=total.dtype)
        return total


def core_rows(hidden: Tensor, margin: Tensor, lengths: Tensor) -> Tensor:
    """Drop the rows that were encoded as context only.

    Parameters
    ----------
    hidden : Tensor of shape (B, T', H)
    margin : int64 Tensor of shape (B,)
        Rows before the crop.
    lengths : int64 Tensor of shape (B,)
        Of the crops.

    Returns
    -------
    Tensor of shape (B, max(lengths), H)
        Rows after a crop's end do not matter.
    """
    index = margin[:, None] + torch.arange(int(lengths.max()), device=hidden.device)
    index = index.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
