"""Exact engine: sums over all paths of a semi-Markov model given by an edge tensor.

A path visits nodes 0 = n_0 < n_1 < ... < lengths-1 with a label at each. Its edges are
``edge[b, n, k, c_dst, c_src]``: from label c_src at node n to label c_dst at node n + k, k < K.
Index k is the duration itself, so index 0 is never used. The label of node 0 is free and summed
over.

The semiring determines the result: log Z, the best score, the k best scores, entropy, ... The scans
take time N·K·C², and the edge tensor as much memory, which `flash_semicrf.streaming` avoids.

References
----------
S. Sarawagi and W. W. Cohen, Semi-Markov Conditional Random Fields for Information Extraction,
NIPS 2004. A. M. Rush, Torch-Struct: Deep Structured Prediction Library, ACL 2020: the edge tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_semicrf.exact.banded import banded_tree
from flash_semicrf.exact.parts import from_parts, hsmm_edges, score_parts, to_parts
from flash_semicrf.exact.scan import linear_scan, num_durations
from flash_semicrf.exact.tree import binary_tree, tree_bytes
from flash_semicrf.exact.vectorized import vectorized_scan
from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.problem.validation import (
    check_eager,
    check_lengths,
    check_number,
    check_tensor,
    extremes,
)
from flash_semicrf.semirings.base import Semiring, as_semiring

__all__ = ["SemiMarkov"]

_SCAN_ABOVE = 200
_TREE_TERMS = 2**13
"""Numbers in one step's product of matrices up to which a tree is quicker, measured on a CPU."""


class SemiMarkov:
    """Inference over edge tensors with a semiring.

    Parameters
    ----------
    semiring : Semiring or subclass
        Semiring of the sum over paths; see `flash_semicrf.semirings`. A class is instantiated
        without arguments.
    memory_limit : float, default=8e9
        Largest size of the first level of a binary tree, in bytes; a larger tree raises ValueError.

    Raises
    ------
    TypeError, ValueError
        If `semiring` is not a semiring, or `memory_limit` not a positive number.

    Examples
    --------
    Zero potentials count paths: with durations 1 and 2 there are five from node 0 to node 4.

    >>> from flash_semicrf.semirings import LogSemiring
    >>> v, _, _ = SemiMarkov(LogSemiring).logpartition(torch.zeros(1, 4, 3, 1, 1))
    >>> [[round(x, 4) for x in row] for row in v.exp().tolist()]
    [[5.0]]
    """

    def __init__(self, semiring: Semiring | type[Semiring], memory_limit: float = 8e9) -> None:
        self.semiring = as_semiring(semiring)
        check_number("memory_limit", memory_limit, infinite=True)
        self.memory_limit = memory_limit

    def logpartition(
        self,
        log_potentials: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        force_grad: bool = False,
        use_linear_scan: bool | None = None,
        use_vectorized: bool = False,
        use_banded: bool = False,
    ) -> tuple[Tensor, list[Tensor], None]:
        """Sum over all paths.

        Parameters
        ----------
        log_potentials : Tensor of shape (B, N-1, K, C, C), or a pair of them
            Edges; -inf (and anything <= NEG_INF) forbids. A pair, which may be stacked in front,
            for semirings that compare two distributions. Entries that no path can use (k = 0,
            edges past a sequence's last node) are ignored, whatever they hold.
        lengths : integer Tensor of shape (B,), optional
            Nodes of each sequence, in [1, N]; all N by default.
        force_grad : bool, default=False
            Return potentials that require a gradient even if the given ones do not.
        use_linear_scan : bool, optional
            True: the linear scan. False: the binary tree. None: the faster one, which is the scan
            except for the smallest K·C and B.
        use_vectorized : bool, default=False
            The vectorised scan, which is faster and takes more memory than the linear scan.
        use_banded : bool, default=False
            The tree with banded matrices at the levels where they are cheaper.

        Returns
        -------
        v : Tensor of shape (size, B)
            Value of each sequence in the semiring, with all its components; `sum` returns the
            result alone. In the dtype of the potentials, half precision upcast to float32; the
            scans sum in float64 (float32 on devices without it).
        edges : list of Tensor
            The potentials (one tensor or two) that v is differentiable in.
        charts : None

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, options contradict each other, or a tree would take more
            than `memory_limit`: raised before anything is allocated, with the size needed.
        """
        given = self._edges(log_potentials, force_grad)
        edges = given[0] if len(given) == 1 else torch.stack(given)
        if lengths is None:
            lengths = torch.full((edges.shape[-5],), edges.shape[-4] + 1, device=edges.device)
        lengths = check_lengths(lengths, edges.shape[-5], edges.shape[-4] + 1).to(edges.device)
        edges = _cleaned(edges, lengths, self.semiring.log_domain)
        run = self._algorithm(edges, lengths, use_linear_scan, use_vectorized, use_banded)
        v = run(self.semiring, edges, lengths)
        if edges.requires_grad and not v.requires_grad:
            v = v + edges[..., :0].sum()  # no path has an edge: the gradient is 0
        return v.to(edges.dtype), given, None

    def _edges(self, log_potentials: Tensor | Sequence[Tensor], force_grad: bool) -> list[Tensor]:
        """Given edge tensors, checked for type, dtype and shape."""
        check_eager()
        count = self.semiring.num_potentials
        if not isinstance(log_potentials, (Tensor, list, tuple)):
            check_tensor("log_potentials", log_potentials)
        if isinstance(log_potentials, Tensor) and count == 1:
            log_potentials = [log_potentials]
        given = list(log_potentials)
        for edges in given:
            check_tensor("log_potentials", edges)
        if len(given) != count:
            raise ValueError(
                f"`log_potentials` must hold {count} edge tensors for "
                f"{type(self.semiring).__name__}; got {len(given)}."
            )
        for edges in given:
            if not edges.is_floating_point():
                raise TypeError(
                    f"`log_potentials` must have a floating-point dtype; got {edges.dtype}."
                )
            shape = tuple(edges.shape)
            square = len(shape) == 5 and shape[3] == shape[4]
            if not square or 0 in (shape[0], *shape[2:]) or shape != tuple(given[0].shape):
                raise ValueError(
                    "`log_potentials` must have shape (B, N-1, K, C, C), the same for both of a "
                    f"pair; got {shape}."
                )
        given = [edges.float() if edges.itemsize < 4 else edges for edges in given]
        if force_grad:
            given = [e if e.requires_grad else e.detach().requires_grad_() for e in given]
        return given

    def _algorithm(
        self,
        edges: Tensor,
        lengths: Tensor,
        use_linear_scan: bool | None,
        use_vectorized: bool,
        use_banded: bool,
    ) -> Callable[[Semiring, Tensor, Tensor], Tensor]:
        if use_vectorized and (use_linear_scan is False or use_banded):
            raise ValueError("`use_vectorized`=True is a scan; it contradicts a tree.")
        if use_banded and use_linear_scan:
            raise ValueError("`use_banded`=True is a tree; it contradicts `use_linear_scan`=True.")
        if use_vectorized:
            return vectorized_scan
        size = tree_bytes(self.semiring, edges, lengths)
        if use_linear_scan is None and not use_banded:
            side = num_durations(edges, lengths)[1] * edges.shape[-1]
            terms = self.semiring.matmul_terms(edges.shape[-5], side, side, side)
            large = edges.shape[-3] * edges.shape[-1] > _SCAN_ABOVE
            use_linear_scan = large or terms > _TREE_TERMS or size > self.memory_limit
        if use_linear_scan:
            return linear_scan
        if size > self.memory_limit:
            raise ValueError(
                f"A binary tree over edges of shape {tuple(edges.shape)} would take {size} bytes "
                f"({size / 1e9:.3g} GB) for its first level, more than "
                f"memory_limit={self.memory_limit:.3g}; pass `use_linear_scan`=True, or a "
                "CheckpointShardSemiring."
            )
        return banded_tree if use_banded else binary_tree

    def sum(
        self,
        log_potentials: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Result of the sum over all paths for each sequence.

        Parameters
        ----------
        log_potentials, lengths, **options
            As for `logpartition`.

        Returns
        -------
        Tensor of shape (B,), or (k, B) for `KMaxSemiring`

        Raises
        ------
        TypeError, ValueError
            As for `logpartition`.
        """
        v, _, _ = self.logpartition(log_potentials, lengths, **options)
        return self.semiring.unconvert(v)

    def marginals(
        self,
        log_potentials: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Gradient of `sum` with respect to every edge.

        The probability of each edge with `LogSemiring`; the indicator of one best path with
        `MaxSemiring`, of each of the k best with `KMaxSemiring`.

        Parameters
        ----------
        log_potentials, lengths, **options
            As for `logpartition`. Without options the vectorised scan runs.

        Returns
        -------
        Tensor of shape (B, N-1, K, C, C)
            With a leading axis of size k for `KMaxSemiring`, and one of size 2 for a semiring of
            pairs. Differentiable if the potentials require a gradient.

        Raises
        ------
        TypeError, ValueError
            As for `logpartition`.
        """
        options = options or {"use_vectorized": True}
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            v, edges, _ = self.logpartition(log_potentials, lengths, force_grad=True, **options)
            answer = self.semiring.unconvert(v)
            rows = answer if answer.dim() == 2 else answer[None]
            create_graph = create_graph and _requires_grad(log_potentials)
            found = []
            for i, row in enumerate(rows):
                last = i + 1 == len(rows)
                finite = torch.where(row.isfinite(), row, 0.0).sum()
                grads = torch.autograd.grad(
                    finite, edges, retain_graph=create_graph or not last, create_graph=create_graph
                )
                found.append(grads[0] if len(grads) == 1 else torch.stack(grads))
        return torch.stack(found) if answer.dim() == 2 else found[0]

    def score(self, potentials: Tensor, parts: Tensor) -> Tensor:
        """Score of given paths: the semiring product of their edges.

        Parameters
        ----------
        potentials : Tensor of shape (B, N-1, K, C, C)
        parts : Tensor of shape (B, N-1, K, C, C)
            1 for the edges of the path, else 0; see `to_parts`.

        Returns
        -------
        Tensor of shape (B,)
            One score per path, also with `KMaxSemiring`.

        Raises
        ------
        TypeError, ValueError
            If the shapes differ, or `parts` holds other numbers than 0 and 1.
        """
        return score_parts(self.semiring, potentials, parts)

    @staticmethod
    def to_parts(sequence: Tensor, extra: tuple[int, int], lengths: Tensor | None = None) -> Tensor:
        """Indicator of the edges of paths: see `flash_semicrf.exact.parts.to_parts`."""
        return to_parts(sequence, extra, lengths)

    @staticmethod
    def from_parts(edge: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Labels of visited nodes: see `flash_semicrf.exact.parts.from_parts`."""
        return from_parts(edge)

    @staticmethod
    def hsmm(init: Tensor, trans_z: Tensor, trans_l: Tensor, emission: Tensor) -> Tensor:
        """Edges of a hidden semi-Markov model: see `flash_semicrf.exact.parts.hsmm_edges`."""
        return hsmm_edges(init, trans_z, trans_l, emission)


def _requires_grad(log_potentials: Tensor | Sequence[Tensor]) -> bool:
    if isinstance(log_potentials, Tensor):
        return log_potentials.requires_grad
    return any(edges.requires_grad for edges in log_potentials)


def _cleaned(edges: Tensor, lengths: Tensor, log_domain: bool) -> Tensor:
    """Edges with usable entries checked, infinite unusable ones blanked, and NEG_INF as -inf."""
    if not edges.numel():
        return edges
    low, high = extremes(edges)
    if not (high < math.inf and (log_domain or low > -math.inf)):
        edges = _blanked(edges, lengths)
        bad = edges.isnan() | (edges == math.inf)
        wanted = "finite or -inf (forbidden)"
        if not log_domain:
            bad, wanted = bad | (edges == -math.inf), "finite (weights, not logarithms)"
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"`log_potentials` must be {wanted}; got {float(edges[index])} at index {index}."
            )
    # Compared as the dtype rounds it.
    limit = float(torch.tensor(NEG_INF, dtype=edges.dtype, device="cpu"))
    # `low` may be that of an entry since blanked: then it is NaN, or below all others.
    maybe = log_domain and not low > limit
    if maybe and bool(((edges <= limit) & (edges > -math.inf)).any()):
        edges = edges.masked_fill(edges <= limit, -math.inf)
    return edges


def _blanked(edges: Tensor, lengths: Tensor) -> Tensor:
    """Edges with zeros where no path leads: duration 0, and past the last node of a sequence."""
    node = torch.arange(edges.shape[-4], device=edges.device)
    duration = torch.arange(edges.shape[-3], device=edges.device)
    arrival = node[:, None] + duration
    usable = (duration >= 1) & (arrival < lengths[:, None, None])
    return edges.masked_fill(~usable[..., None, None], 0.0)
