"""CRF head: a module from encoder outputs to likelihoods, segmentations and marginals.

    hidden_states (B, T, D) -> projection -> scores (B, T, C) -> centring -> `Potentials`
        -> log Z, gold score, best segmentation, marginals

All quantities are computed from the same `flash_semicrf.problem.potentials.Potentials`, so that the
loss is the negative logarithm of a probability. Cost T(KC + C²) per sequence; gradients are exact.

References
----------
S. Sarawagi and W. W. Cohen, Semi-Markov Conditional Random Fields for Information Extraction,
NIPS 2004.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.duration import (
    DurationDistribution,
    GeometricTail,
    create_duration_distribution,
    create_duration_tail,
)
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.nn.allowed import allowed_durations, allowed_transitions
from flash_semicrf.nn.decoding import DecodingMixin
from flash_semicrf.nn.inputs import (
    backend_name,
    blank_padding,
    cast,
    check_numbers,
    full_precision,
    project,
    update_pruned,
)
from flash_semicrf.nn.loss import LossMixin, Reduction
from flash_semicrf.nn.objectives import LOSSES, Loss
from flash_semicrf.nn.operators import checked_input
from flash_semicrf.problem.flags import Validate, reads_values, with_lengths_on_device
from flash_semicrf.problem.potentials import (
    NEG_INF,
    Centering,
    Potentials,
    accumulator_dtype,
    center_scores,
    forbid,
)
from flash_semicrf.problem.segments import LongSegments
from flash_semicrf.problem.validation import (
    check_choice,
    check_eager,
    check_floating_dtype,
    check_form_of_lengths,
    check_number,
    check_positive_int,
    check_tensor,
)

__all__ = ["Reduction", "SemiMarkovCRFHead"]


class SemiMarkovCRFHead(DecodingMixin, LossMixin, nn.Module):
    """Semi-Markov CRF on top of an encoder.

    Parameters
    ----------
    num_classes : int
        Number of labels C.
    max_duration : int
        Longest segment K, in positions; durations are 1..K.
    hidden_dim : int, optional
        Channels D of the encoder, projected to C scores. If None, the input has C channels and is
        used as the scores.
    init_scale : float, default=0.1
        Standard deviation of the initial transitions and of the initial "learned" durations.
    duration_distribution : str, DurationDistribution, callable or None
        See `flash_semicrf.duration.create_duration_distribution`; None means "learned".
    edge_memory_threshold : float, default=8e9
        Largest size, in bytes, of the edge tensor and of the first level of a tree that
        ``backend="exact"`` and "binary_tree_sharded" may build; above it they raise ValueError.
    num_warps : int, default=4
        Accepted for compatibility; kernels choose their own launch parameters.
    centering : {"position", "sequence", "none"}, default="position"
        See `flash_semicrf.problem.potentials.center_scores`. "position" does not change the model.
    long_segments : {"split", "error"}, default="split"
        Treatment of a run of equal gold labels longer than K, without a duration tail: split it
        into near-equal pieces, with a warning, or raise ValueError.
    min_duration : int, sequence of C ints or dict of label to int, default=1
        Shortest segment of each label, in positions. Shorter ones are forbidden.
    transition_constraints : bool array-like of shape (C, C), optional
        ``[c_src, c_dst]`` is False where label c_dst must not follow c_src. A label that may not
        follow any label cannot start a sequence either, unless ``initial_scores`` is True.
    initial_scores, final_scores : bool, default=False
        Learn a score per label for the first segment, in place of its transition term, and for the
        last.
    boundary_scores : bool, default=False
        Also project the hidden states to scores of starting and of ending a segment of each label
        at each position. Needs ``hidden_dim``.
    duration_tail : None, "geometric", float, array-like (C,) or GeometricTail, default=None
        Allow segments longer than K: every further position adds a log-rate to the score of
        duration K. "geometric" learns the rate of each label, initialised by the slope of the last
        two duration scores; the "geometric" distribution uses its own rate instead, without further
        parameters. Numbers are fixed rates; -inf limits a label to K positions.
    accum_dtype : torch.dtype, default=torch.float64
        Accepted for compatibility; sums are in float64 (float32 on devices without it) in any case.
    loss : {"likelihood", "marginal", "boundary", "softmax_margin", "focal"}, default="likelihood"
        What `compute_loss` computes unless it is told otherwise; see there.
    validate : {"auto", "values", "shapes"}, default="auto"
        "values" reads lengths, hidden states, labels and scores, and raises an error that names a
        bad one. "shapes" reads nothing, so that a GPU need not be waited for: see Notes. "auto" is
        "shapes" on CUDA devices and "values" elsewhere.

    Attributes
    ----------
    transition : Parameter of shape (C, C)
        ``transition[c_src, c_dst]``, before constraints.
    duration_distribution : DurationDistribution
    tail : GeometricTail or None
    projection : nn.Module or None
        An nn.Linear, called with hidden states (B, T, D); any module that returns (B, T, C) may
        take its place.
    boundary_projection : nn.Module or None
        The same, to 2C channels: start scores, then end scores.
    initial_scores, final_scores : Parameter of shape (C,) or None
    validate : str
        May be changed at any time.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; the message names it.

    Notes
    -----
    Half-precision inputs, and inputs under autocast, are upcast to float32. Constraints and minimum
    durations are configuration: they are not part of ``state_dict``, and are kept by a head that is
    created on the meta device, allocated by ``to_empty`` and loaded.

    With ``validate="shapes"`` a sequence with NaN or plus infinity in its scores, a length outside
    [1, T] or a label outside [0, C) has log Z, loss and gradient NaN; one whose gold segmentation
    the model forbids the loss infinity and gradient NaN. Long gold segments are split without the
    warning, or with ``long_segments="error"`` have the loss NaN. Lengths on the CPU are read in any
    case, and so are values where the labels of a loss are a SegmentTable or partly unknown, with
    `constraints`, and by ``backend="exact"`` and "binary_tree_sharded".

    Examples
    --------
    >>> import torch
    >>> from flash_semicrf.nn import SemiMarkovCRFHead
    >>> crf = SemiMarkovCRFHead(num_classes=3, max_duration=10, hidden_dim=16)
    >>> hidden, lengths = torch.randn(2, 50, 16), torch.tensor([50, 30])
    >>> labels = torch.arange(50).div(5, rounding_mode="floor").remainder(3).expand(2, 50)
    >>> loss = crf.compute_loss(hidden, lengths, labels)
    >>> loss.backward()
    >>> result = crf.decode_with_traceback(hidden, lengths)
    >>> [segments[-1].end for segments in result.segments]
    [49, 29]
    """

    projection: nn.Module | None
    boundary_projection: nn.Module | None
    initial_scores: nn.Parameter | None
    final_scores: nn.Parameter | None
    loss: Loss = "likelihood"
    validate: Validate = "auto"

    def __init__(
        self,
        num_classes: int,
        max_duration: int,
        hidden_dim: int | None = None,
        init_scale: float = 0.1,
        duration_distribution: (
            str | DurationDistribution | Callable[[Tensor], Tensor] | None
        ) = None,
        edge_memory_threshold: float = 8e9,
        num_warps: int = 4,
        *,
        centering: Centering = "position",
        long_segments: LongSegments = "split",
        min_duration: int | Sequence[int] | Mapping[int, int] = 1,
        transition_constraints: Tensor | ArrayLike | None = None,
        initial_scores: bool = False,
        final_scores: bool = False,
        boundary_scores: bool = False,
        duration_tail: str | float | ArrayLike | Tensor | GeometricTail | None = None,
        accum_dtype: torch.dtype = torch.float64,
        validate: Validate = "auto",
        loss: Loss = "likelihood",
    ) -> None:
        super().__init__()
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.max_duration = check_positive_int("max_duration", max_duration)
        if hidden_dim is not None:
            check_positive_int("hidden_dim", hidden_dim)
        self.hidden_dim = hidden_dim
        check_choice("centering", centering, ("position", "sequence", "none"))
        check_choice("long_segments", long_segments, ("split", "error"))
        check_numbers(init_scale, edge_memory_threshold, num_warps)
        check_floating_dtype("accum_dtype", accum_dtype)
        check_choice("validate", validate, ("auto", "values", "shapes"))
        if boundary_scores and hidden_dim is None:
            raise ValueError("`boundary_scores`=True needs `hidden_dim`; got hidden_dim=None.")
        self.init_scale = init_scale
        self.edge_memory_threshold = edge_memory_threshold
        self.num_warps = num_warps
        self.accum_dtype = accum_dtype
        check_choice("loss", loss, LOSSES)
        if loss != self.loss:
            self.loss = loss
        if validate != self.validate:  # else that of the class, as in heads saved without it
            self.validate = validate
        self.centering: Centering = centering
        self.long_segments: LongSegments = long_segments

        self.transition = nn.Parameter(float(init_scale) * torch.randn(num_classes, num_classes))
        is_learned = duration_distribution in (None, "learned")
        self.duration_distribution = create_duration_distribution(
            duration_distribution,
            max_duration,
            num_classes,
            **({"init_scale": init_scale} if is_learned else {}),
        )
        self.tail = create_duration_tail(duration_tail, self.duration_distribution)
        self._ties_tail = duration_tail is not None and self.tail is None
        self.projection = nn.Linear(hidden_dim, num_classes) if hidden_dim else None
        self.boundary_projection = (
            nn.Linear(hidden_dim, 2 * num_classes) if hidden_dim and boundary_scores else None
        )
        for name, present in (("initial_scores", initial_scores), ("final_scores", final_scores)):
            values = nn.Parameter(torch.zeros(num_classes)) if present else None
            self.register_parameter(name, values)

        # Plain attributes: a loader that allocates buffers anew would leave them without values.
        self._allowed_durations = allowed_durations(min_duration, max_duration, num_classes)
        self._allowed_transitions = allowed_transitions(transition_constraints, num_classes)

    # Parameters as the model uses them

    @property
    def allowed_durations(self) -> Tensor | None:
        """Durations allowed by minimum durations, bool Tensor of shape (K, C); None allows all."""
        return self._on_device("_allowed_durations")

    @allowed_durations.setter
    def allowed_durations(self, allowed: Tensor | None) -> None:
        self._allowed_durations = allowed

    @property
    def allowed_transitions(self) -> Tensor | None:
        """Transitions allowed by constraints, bool Tensor of shape (C, C); None allows all."""
        return self._on_device("_allowed_transitions")

    def _on_device(self, name: str) -> Tensor | None:
        """Mask on the device of the head, where it is kept."""
        mask: Tensor | None = getattr(self, name)
        device = self.transition.device
        if mask is not None and mask.device != device:
            mask = mask.to(device, non_blocking=True)
            if device.type != "meta":
                setattr(self, name, mask)
        return mask

    @property
    def duration_bias(self) -> Tensor:
        """Score of every duration, Tensor of shape (K, C); -inf below the minimum durations.

        Raises
        ------
        ValueError
            If the duration distribution returns another shape.
        """
        bias = self.duration_distribution().to(self.transition.device)
        shape = (self.max_duration, self.num_classes)
        if tuple(bias.shape) != shape:
            raise ValueError(
                f"`duration_distribution` must return shape (K={shape[0]}, C={shape[1]}); "
                f"got {tuple(bias.shape)}."
            )
        return forbid(bias, self.allowed_durations)

    @property
    def duration_tail(self) -> Tensor | None:
        """Log-rate of durations beyond K, Tensor of shape (C,); None without a duration tail."""
        if self._ties_tail:
            return self.duration_distribution.tail_log_rate()
        return None if self.tail is None else self.tail()

    @property
    def constrained_transition(self) -> Tensor:
        """Transition scores, Tensor of shape (C, C); -inf where a constraint forbids."""
        return forbid(self.transition, self.allowed_transitions)

    def parameter_penalty(self, p: float = 2.0) -> Tensor:
        """``||transition||_p^p + ||duration_bias||_p^p`` without forbidden entries.

        Durations that are not trained are left out too: they would add a constant.

        Parameters
        ----------
        p : float, default=2.0
            Power, > 0.

        Returns
        -------
        Tensor of shape ()
            Differentiable.

        Raises
        ------
        ValueError
            If `p` is not a positive number.
        """
        p = check_number("p", p, infinite=True)
        update_pruned(self)
        terms, bias = [self.constrained_transition], self.duration_bias
        learned = any(x.requires_grad for x in self.duration_distribution.parameters())
        if learned or bias.requires_grad:
            terms.append(bias)
        powers = [term[term > NEG_INF].abs().pow(p).sum() for term in terms]
        return sum(powers[1:], powers[0])

    # From hidden states to a problem

    def potentials(
        self, hidden_states: Tensor, lengths: Tensor, *, centered: bool = True
    ) -> tuple[Potentials, Tensor]:
        """Problem that inference runs on, and the offset that centring subtracts from its scores.

        Parameters
        ----------
        hidden_states : floating Tensor of shape (B, T, D), or (B, T, C) without ``hidden_dim``
            Entries at and after ``lengths`` are ignored.
        lengths : integer Tensor of shape (B,)
            In 1..T.
        centered : bool, default=True
            False skips the centring by position and returns offsets of 0.

        Returns
        -------
        potentials : Potentials
            Differentiable in the input and in the parameters.
        offset : Tensor of shape (B,)
            To be added to log Z, and to any score, of ``potentials``.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid; the message names it.
        """
        with full_precision(hidden_states):
            problem = self._problem(hidden_states, lengths)
            if centered:
                return self._centered(problem)
            wide = accumulator_dtype(problem.device)
            return problem, torch.zeros(problem.batch_size, dtype=wide, device=problem.device)

    def _prepare(
        self, hidden_states: Tensor, lengths: Tensor, backend: str
    ) -> tuple[Potentials, Potentials, Tensor, str]:
        """Problem, centred problem, its offset, and name of the backend."""
        backend = backend_name(backend)
        problem = self._problem(hidden_states, lengths)
        centered, offset = self._centered(problem)
        return problem, centered, offset, backend

    def _problem(self, hidden_states: Tensor, lengths: Tensor) -> Potentials:
        """Problem before centring, but for "sequence" centring, which changes the model."""
        hidden, lengths = self._checked(hidden_states, lengths)
        scores, start, end = hidden, None, None
        if self.projection is not None:
            scores = project(self.projection, "projection", hidden, self.num_classes)
        if self.boundary_projection is not None:
            module, channels = self.boundary_projection, 2 * self.num_classes
            boundary = project(module, "boundary_projection", hidden, channels)
            start, end = boundary.chunk(2, dim=-1)
        return self.potentials_of_scores(scores, lengths, start, end)

    def potentials_of_scores(
        self,
        scores: Tensor,
        lengths: Tensor,
        start_scores: Tensor | None = None,
        end_scores: Tensor | None = None,
    ) -> Potentials:
        """Problem of scores that were projected elsewhere, not centred by position.

        Parameters
        ----------
        scores : floating Tensor of shape (B, T, C)
        lengths : int64 Tensor of shape (B,)
        start_scores, end_scores : Tensor of shape (B, T, C), optional
            Scores of starting and of ending a segment of each label at each position.

        Returns
        -------
        Potentials
            With the head's transitions, durations, and scores of the first and last label.

        Raises
        ------
        TypeError
            If `scores` is not a Tensor.
        """
        check_tensor("scores", scores)
        update_pruned(self)
        if self.centering == "sequence":
            scores, _ = center_scores(scores, lengths, "sequence")
        return Potentials(
            scores=scores,
            transition=self.constrained_transition.to(scores.dtype),
            duration_bias=self.duration_bias.to(scores.dtype),
            lengths=lengths,
            start_scores=start_scores,
            end_scores=end_scores,
            initial_scores=cast(self.initial_scores, scores.dtype),
            final_scores=cast(self.final_scores, scores.dtype),
            duration_tail=cast(self.duration_tail, scores.dtype),
        )

    def _centered(self, problem: Potentials) -> tuple[Potentials, Tensor]:
        mode: Centering = "none" if self.centering == "sequence" else self.centering
        scores, offset = center_scores(problem.scores, problem.lengths, mode)
        return problem.replace(scores=scores), offset

    def _checked(self, hidden_states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Input, checked, in the working dtype and with zeros as padding; and its lengths."""
        traced = torch.compiler.is_compiling()
        if not traced:
            check_eager()
        device = self.transition.device
        channels = self.hidden_dim or self.num_classes
        wanted = "D=hidden_dim" if self.hidden_dim else "C=num_classes"
        if not hidden_states.is_floating_point():
            raise TypeError(
                f"`hidden_states` must have a floating-point dtype; got {hidden_states.dtype}."
            )
        shape = tuple(hidden_states.shape)
        if len(shape) != 3 or 0 in shape or shape[2] != channels:
            raise ValueError(
                f"`hidden_states` must have shape (B, T, {wanted}={channels}) with B, T >= 1; "
                f"got {shape}."
            )
        if hidden_states.device != device:
            raise ValueError(
                f"`hidden_states` must be on the device of the head, {device}; "
                f"got {hidden_states.device}."
            )
        check_form_of_lengths(lengths, shape[0])
        dtype = torch.promote_types(hidden_states.dtype, self.transition.dtype)
        hidden = hidden_states.to(torch.promote_types(dtype, torch.float32))
        if traced:
            blank, checked = checked_input(hidden, lengths)
            return blank, checked
        if reads_values(self.validate, device):
            return blank_padding(hidden, lengths)
        lengths = with_lengths_on_device(lengths, shape[1], device)
        padding = torch.arange(shape[1], device=device) >= lengths[:, None]
        return hidden.masked_fill(padding[..., None], 0.0), lengths

    # Inference

    @accepts_use_triton(2)
    def forward(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
    ) -> dict[str, Tensor]:
        """Compute log Z.

        Parameters
        ----------
        hidden_states : floating Tensor of shape (B, T, D), or (B, T, C) without ``hidden_dim``
            Entries at and after ``lengths`` are ignored.
        lengths : integer Tensor of shape (B,)
            In 1..T.
        backend : str, default="auto"
            "auto" and "streaming" select the fastest backend that supports the problem; a key of
            `flash_semicrf.streaming.dispatch.BACKENDS` selects that one, or raises ValueError with
            the reason why it cannot run. "exact" and "binary_tree_sharded" build the edge tensor
            and scan it, or multiply it in a tree: for checks and small problems.

        Returns
        -------
        dict
            "partition", float64 Tensor of shape (B,): log Z, -inf if no segmentation is feasible.
            "cum_scores", float64 Tensor of shape (B, T+1, C): cumulative sums of the scores, from
            which `flash_semicrf.compat.semi_crf_streaming_forward` computes the same partition,
            with ``constrained_transition``, ``duration_bias`` and the optional parameters, if no
            score is -inf.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid; the message names it.
        """
        with full_precision(hidden_states):
            prepared = self._prepare(hidden_states, lengths, backend)
            problem, centered, offset, backend = prepared
            partition = self._run(log_partition, centered, backend) + offset
            sums = problem.scores.cumsum(1, dtype=accumulator_dtype(problem.device))
            return {"partition": partition, "cum_scores": F.pad(sums, (0, 0, 1, 0))}

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, max_duration={self.max_duration}, "
            f"hidden_dim={self.hidden_dim}, centering={self.centering!r}, "
            f"initial_scores={self.initial_scores is not None}, "
            f"final_scores={self.final_scores is not None}, "
            f"duration_tail={self.duration_tail is not None}"
        )
