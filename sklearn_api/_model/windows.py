"""Encoding long sequences by overlapping windows.

An encoder that states its `receptive_field` (the odd width, in positions and centred, of the
features that a hidden state can depend on) gives the same hidden states when it is run on windows
that overlap by it, up to rounding. Its memory then depends on the window and not on the sequence.
Windows of an encoder that has a `stride` start at multiples of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Context", "encode_in_windows", "encoder_context"]


class Context(NamedTuple):
    """Positions that an encoder has to see around those that it encodes.

    Parameters
    ----------
    reach : int
        Positions on either side, half the receptive field.
    stride : int
        The first position seen is a multiple of this.
    """

    reach: int
    stride: int

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Half-open range to be seen for positions ``[start, stop)`` of a sequence of `length`."""
        first = max(0, start - self.reach) // self.stride * self.stride
        last = -(-(stop + self.reach) // self.stride) * self.stride
        return first, min(last, length)


def encoder_context(encoder: nn.Module) -> Context | None:
    """Context of an encoder, or None where it states no receptive field, as recurrent ones.

    Raises
    ------
    ValueError
        If ``encoder.receptive_field`` is neither None nor an odd integer >= 1.
    """
    field = getattr(encoder, "receptive_field", None)
    if field is None:
        return None
    if not isinstance(field, int) or isinstance(field, bool) or field < 1 or field % 2 == 0:
        raise ValueError(
            f"`receptive_field` of an encoder must be an odd integer >= 1 or None; got {field!r}."
        )
    return Context(field // 2, int(getattr(encoder, "stride", 1)))


def encode_in_windows(module: nn.Module, x: Tensor, lengths: Tensor, window_length: int) -> Tensor:
    """Hidden states of a batch, the encoder being run on bounded pieces.

    Parameters
    ----------
    module : SegmentationModule
        Called as ``module(x, lengths)``; its `encoder` states the receptive field.
    x : Tensor of shape (B, T, D)
        On any device; moved to that of `lengths` piece by piece.
    lengths : int64 Tensor of shape (B,)
    window_length : int
        Positions that a window adds to the result; it is run with the receptive field around them.

    Returns
    -------
    Tensor of shape (B, T, H)
        On the device of `lengths`.
    """
    num_positions = x.shape[1]
    context = encoder_context(module.encoder)
    if context is None or num_positions <= window_length:
        return module(x.to(lengths.device), lengths)
    hidden = None
    for start in range(0, num_positions, window_length):
        stop = min(start + window_length, num_positions)
        first, last = context.span(start, stop, num_positions)
        inside = (lengths - first).clamp(1, last - first)
        part = module(x[:, first:last].to(lengths.device), inside)[:, start - first : stop - first]
        if hidden is None:
            hidden = part.new_empty(len(part), num_positions, part.shape[2])
        hidden[:, start:stop] = part
    return hidden
