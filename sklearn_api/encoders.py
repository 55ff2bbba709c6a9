"""Encoders: from features per position (B, T, D) to hidden states (B, T, H).

An encoder is an `nn.Module` called as ``encoder(x, lengths)``, or as ``encoder(x)`` if its
`forward` takes one argument. Its attribute ``out_features`` is the width H of its output; without
it, two positions are encoded to determine the width. The output of the encoders defined here does
not depend on padding or on the other sequences of a batch.

The optional attribute ``receptive_field`` is the odd number of positions, centred, on which an
output can depend; long sequences are then encoded in windows (`sklearn_api._model.windows`). If it
is None or absent, an output may depend on all positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flash_semicrf.problem.potentials import accumulator_dtype

__all__ = [
    "CNNEncoder",
    "GRUEncoder",
    "LinearEncoder",
    "MLPEncoder",
    "Standardize",
    "make_encoder",
    "position_moments",
]


class LinearEncoder(nn.Module):
    """Identity: the projection of the head is then the whole model, which is linear.

    Parameters
    ----------
    in_features : int
        Number of features D, and width of the output.
    """

    receptive_field = 1

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class MLPEncoder(nn.Module):
    """Multi-layer perceptron applied to every position.

    Parameters
    ----------
    in_features : int
        Number of features D.
    hidden_size : int, default=64
        Width of the layers and of the output.
    num_layers : int, default=1
    dropout : float, default=0.0
        Probability of zeroing a hidden unit in training.
    """

    receptive_field = 1

    def __init__(
        self, in_features: int, hidden_size: int = 64, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.out_features = hidden_size
        sizes = [in_features] + [hidden_size] * num_layers
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, hidden_size)."""
        hidden: Tensor = self.layers(x)
        return hidden


class _ResidualBlock(nn.Module):
    """x + conv1x1(GELU(dilated conv(norm(x)))), with padding kept at zero."""

    def __init__(self, hidden_size: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        reach = dilation * (kernel_size - 1) // 2
        self.wide = nn.Conv1d(
            hidden_size, hidden_size, kernel_size, dilation=dilation, padding=reach
        )
        self.mix = nn.Conv1d(hidden_size, hidden_size, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        # Statistics per position, independent of padding and batch.
        h = self.norm(x.transpose(1, 2)).transpose(1, 2) * valid
        change: Tensor = self.dropout(self.mix(nn.functional.gelu(self.wide(h)))) * valid
        return x + change


class CNNEncoder(nn.Module):
    """Dilated residual convolutions; layer i has dilation 2**i.

    The receptive field is ``1 + (kernel_size - 1) * 2**num_layers`` positions, and about `stride`
    times that with ``stride`` > 1. In that case the layers work on every `stride`-th position, at
    that fraction of the cost, and one more layer upsamples the result to every position.

    Parameters
    ----------
    in_features : int
        Number of features D.
    hidden_size : int, default=64
        Number of channels, and width of the output.
    num_layers : int, default=4
    kernel_size : int, default=5
        Width of the convolutions, in positions; odd, so that outputs are aligned with positions.
    dropout : float, default=0.0
        Probability of zeroing a hidden unit in training.
    stride : int, default=1
        In positions, >= 1.

    Raises
    ------
    ValueError
        If `kernel_size` is even or `stride` < 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int = 64,
        num_layers: int = 4,
        kernel_size: int = 5,
        dropout: float = 0.0,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd; got {kernel_size}.")
        if stride < 1:
            raise ValueError(f"`stride` must be an integer >= 1; got {stride!r}.")
        self.out_features = hidden_size
        self.stride = stride
        self.lift = nn.Conv1d(in_features, hidden_size, kernel_size, padding=kernel_size // 2)
        self.blocks = nn.ModuleList(
            _ResidualBlock(hidden_size, kernel_size, 2**i, dropout) for i in range(num_layers)
        )
        if stride > 1:
            self.down = nn.Conv1d(hidden_size, hidden_size, stride, stride)
            self.up = nn.ConvTranspose1d(hidden_size, hidden_size, stride, stride)
            self.fine = _ResidualBlock(hidden_size, kernel_size, 1, dropout)
        self.norm = nn.LayerNorm(hidden_size)
        half = kernel_size // 2
        reach = half * 2**num_layers  # of the lift and the blocks
        if stride > 1:
            coarse = half * (2**num_layers - 1)
            reach = 2 * half + coarse * stride + stride - 1
        self.receptive_field = 1 + 2 * reach

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, hidden_size); rows after the end of a sequence are ignored."""
        num_positions = x.shape[1]
        position = torch.arange(num_positions, device=x.device)
        valid = (position < lengths[:, None])[:, None]
        h: Tensor = self.lift(x.transpose(1, 2) * valid) * valid
        if self.stride == 1:
            for block in self.blocks:
                h = block(h, valid)
            return self._normalised(h)
        rest = -num_positions % self.stride
        coarse_valid = nn.functional.pad(valid, (0, rest))[..., :: self.stride]
        coarse = self.down(nn.functional.pad(h, (0, rest))) * coarse_valid
        for block in self.blocks:
            coarse = block(coarse, coarse_valid)
        h = (h + self.up(coarse)[..., :num_positions]) * valid
        return self._normalised(self.fine(h, valid))

    def _normalised(self, h: Tensor) -> Tensor:
        """Map channels first, (B, H, T), to normalised channels last, (B, T, H)."""
        hidden: Tensor = self.norm(h.transpose(1, 2))
        return hidden


class GRUEncoder(nn.Module):
    """Bidirectional gated recurrent units, with half of `hidden_size` per direction.

    Parameters
    ----------
    in_features : int
        Number of features D.
    hidden_size : int, default=64
        Width of the output; even.
    num_layers : int, default=1
    dropout : float, default=0.0
        Probability of zeroing a hidden unit in training, between layers and in the output.

    Raises
    ------
    ValueError
        If `hidden_size` is odd.
    """

    def __init__(
        self, in_features: int, hidden_size: int = 64, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f'`hidden_size` must be even for encoder="gru"; got {hidden_size}.')
        self.out_features = hidden_size
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(
            in_features,
            hidden_size // 2,
            num_layers,
            batch_first=True,
            bidirectional=True,
            dropout=between,
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, hidden_size); rows after the end of a sequence are zero."""
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        dropped: Tensor = self.dropout(hidden)
        return dropped


class Standardize(nn.Module):
    """Centre and scale each feature by statistics of the training positions, in float64.

    The statistics remain in float64 when an enclosing module changes its dtype: features with a
    large offset, such as times, lose precision only if they are cast before.

    Parameters
    ----------
    mean, std : array-like of shape (D,)
        Mean and standard deviation of each feature; a standard deviation of 0 is replaced by 1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        std = np.where(np.asarray(std) > 0, std, 1.0)
        self.register_buffer("mean", torch.as_tensor(np.asarray(mean, dtype=np.float64)))
        self.register_buffer("scale", torch.as_tensor(1.0 / std))

    @classmethod
    def from_positions(cls, values: list[np.ndarray]) -> Standardize:
        """Module with the statistics of all positions of sequences of shape (T_i, D)."""
        return cls(*position_moments(values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        # `to`, `cuda` and so on change the device of the buffers, but not their dtype.
        device = fn(torch.zeros(1)).device
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(device, accumulator_dtype(device)))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map x to ``(x - mean) / std``, in float64 if the device has it."""
        return (x - self.mean).mul_(self.scale)


def position_moments(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all positions, two float64 arrays (D,).

    Differences from the first position are summed, so that a constant has exactly zero deviation.
    """
    count = sum(len(x) for x in values)
    origin = values[0][0].astype(np.float64)
    mean = origin + sum((x - origin).sum(0) for x in values) / count
    square = sum(np.square(x - mean).sum(0) for x in values)
    return mean, np.sqrt(square / count)


class _TakesNoLengths(nn.Module):
    """Adapter for a module whose `forward` has one argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.receptive_field = getattr(module, "receptive_field", None)
        self.stride = getattr(module, "stride", 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden: Tensor = self.module(x)
        return hidden


# Settings of the estimator that each encoder uses.
_BUILTIN: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "linear": (LinearEncoder, ()),
    "mlp": (MLPEncoder, ("hidden_size", "num_layers", "dropout")),
    "cnn": (CNNEncoder, ("hidden_size", "num_layers", "kernel_size", "dropout")),
    "gru": (GRUEncoder, ("hidden_size", "num_layers", "dropout")),
}

ENCODERS = tuple(_BUILTIN)


def make_encoder(
    encoder: str | type[nn.Module] | nn.Module,
    in_features: int,
    settings: dict[str, Any],
    module_params: dict[str, Any] | None = None,
) -> tuple[nn.Module, int]:
    """Encoder called as ``encoder(x, lengths)``, and its output width.

    Parameters
    ----------
    encoder : {"linear", "mlp", "cnn", "gru"}, nn.Module class or instance
        A class is called as ``encoder(in_features, **module_params)``; an instance is copied.
    in_features : int
        Number of features D.
    settings : dict
        ``hidden_size``, ``num_layers``, ``kernel_size`` and ``dropout``, used by named encoders.
    module_params : dict, optional
        Further arguments of the class or of the named encoder.

    Returns
    -------
    module : nn.Module
    out_features : int
        Width H of its output.

    Raises
    ------
    ValueError
        If `module_params` are given for an instance, or the output has no shape (B, T, H).
    """
    module_params = dict(module_params or {})
    if isinstance(encoder, str):
        build, names = _BUILTIN[encoder]
        module = build(in_features, **{name: settings[name] for name in names}, **module_params)
    elif isinstance(encoder, type):
        module = encoder(in_features, **module_params)
    else:
        if module_params:
            raise ValueError(
                f"`module__{next(iter(module_params))}` needs an encoder given by name or as a "
                "class; got an instance, which is already built."
            )
        module = copy.deepcopy(encoder)
    out_features = getattr(module, "out_features", None)
    if not _takes_lengths(module):
        module = _TakesNoLengths(module)
    return module, int(out_features or _probe(module, in_features))


def _takes_lengths(module: nn.Module) -> bool:
    """Whether `forward` has an argument named lengths, or a second required one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters
    needed = [p for p in parameters.values() if p.kind in kinds and p.default is p.empty]
    return "lengths" in parameters or len(needed) >= 2


def _probe(module: nn.Module, in_features: int) -> int:
    """Width of the output of a module, determined by encoding two positions."""
    training = module.training
    module.eval()
    with torch.no_grad():
        parameter = next(module.parameters(), None)
        dtype = None if parameter is None else parameter.dtype
        hidden = module(torch.zeros(1, 2, in_features, dtype=dtype), torch.tensor([2]))
    module.train(training)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (1, 2):
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            "`encoder` must map a (B, T, D) tensor to a (B, T, H) tensor; for an input of shape "
            f"{(1, 2, in_features)} it gave {got}."
        )
    return hidden.shape[2]
