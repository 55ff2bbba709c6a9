"""Paths as indicator tensors, their scores, and the edges of a hidden semi-Markov model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.validation import check_lengths, check_tensor
from flash_semicrf.semirings.base import Semiring

__all__ = ["from_parts", "hsmm_edges", "score_parts", "to_parts"]


def to_parts(sequence: Tensor, extra: tuple[int, int], lengths: Tensor | None = None) -> Tensor:
    """Indicator of the edges of paths.

    Parameters
    ----------
    sequence : integer Tensor of shape (B, N)
        Label of each node that the path visits, -1 for the others. Node 0 must be visited. A path
        that stops before the last node has no edge after the last node that it visits.
    extra : (C, K)
        Labels, and entries of the duration axis (longest duration + 1).
    lengths : integer Tensor of shape (B,), optional
        Number of nodes of each sequence, N by default; later nodes are ignored.

    Returns
    -------
    int64 Tensor of shape (B, N-1, K, C, C)

    Raises
    ------
    ValueError
        If a row is not a path; the message names the sequence and the node.

    Examples
    --------
    >>> parts = to_parts(torch.tensor([[0, 1, -1, 0]]), (2, 3))
    >>> parts.nonzero().tolist()  # b, n, k, c_dst, c_src
    [[0, 0, 1, 1, 0], [0, 1, 2, 0, 1]]
    """
    check_tensor("sequence", sequence)
    num_labels, num_durations = extra
    batch, nodes = sequence.shape
    if lengths is None:
        lengths = torch.full((batch,), nodes, device=sequence.device)
    lengths = check_lengths(lengths, batch, nodes).to(sequence.device)
    inside = torch.arange(nodes, device=sequence.device) < lengths[:, None]
    wrong = inside & ((sequence < -1) | (sequence >= num_labels))
    wrong[:, 0] |= sequence[:, 0] < 0
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"`sequence` must hold labels in [0, C-1={num_labels - 1}] or -1, and a label at the "
            f"first node; got {int(sequence[index])} at index {index}."
        )
    owner, node = (inside & (sequence >= 0)).nonzero().unbind(1)
    label = sequence[owner, node]
    source = (owner[1:] == owner[:-1]).nonzero()[:, 0]
    duration = node[source + 1] - node[source]
    if bool((duration >= num_durations).any()):
        i = int((duration >= num_durations).nonzero()[0])
        raise ValueError(
            f"`sequence` must visit nodes at most K-1={num_durations - 1} apart; got "
            f"{int(duration[i])} after index {(int(owner[source[i]]), int(node[source[i]]))}."
        )
    shape = (batch, nodes - 1, num_durations, num_labels, num_labels)
    parts = torch.zeros(shape, dtype=torch.int64, device=sequence.device)
    parts[owner[source], node[source], duration, label[source + 1], label[source]] = 1
    return parts


def from_parts(edge: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Labels of the nodes that paths visit: the inverse of `to_parts`.

    Parameters
    ----------
    edge : Tensor of shape (B, N-1, K, C, C)
        Nonzero for the edges of the path.

    Returns
    -------
    sequence : int64 Tensor of shape (B, N)
        -1 for nodes that no edge touches.
    extra : (C, K)

    Examples
    --------
    >>> sequence = torch.tensor([[0, 1, -1, 0]])
    >>> from_parts(to_parts(sequence, (2, 3)))
    (tensor([[ 0,  1, -1,  0]]), (2, 3))
    """
    check_tensor("edge", edge)
    batch, steps, num_durations, num_labels, _ = edge.shape
    sequence = torch.full((batch, steps + 1), -1, device=edge.device)
    owner, node, duration, target, source = edge.nonzero().unbind(1)
    sequence[owner, node] = source
    sequence[owner, node + duration] = target
    return sequence, (num_labels, num_durations)


def score_parts(semiring: Semiring, potentials: Tensor, parts: Tensor) -> Tensor:
    """Semiring product of the edges marked in `parts`.

    Parameters, result and errors are those of `flash_semicrf.SemiMarkov.score`.
    """
    check_tensor("potentials", potentials)
    check_tensor("parts", parts)
    if potentials.shape != parts.shape:
        raise ValueError(
            f"`parts` must have the shape of `potentials`, {tuple(potentials.shape)}; got "
            f"{tuple(parts.shape)}."
        )
    if not bool(((parts == 0) | (parts == 1)).all()):
        raise ValueError("`parts` must hold zeros and ones: the edges of a path.")
    index = parts.nonzero().unbind(1)
    owner = index[0]
    count = torch.bincount(owner, minlength=len(parts))
    place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    shape = (len(parts), int(count.max()))
    values = semiring.full(semiring.one, shape, potentials).clone()
    values[:, owner, place] = semiring.convert(potentials[index])
    answer = semiring.unconvert(semiring.prod(values))
    return answer[0] if answer.dim() == 2 else answer  # of the k best of one path, the only one


def hsmm_edges(init: Tensor, trans_z: Tensor, trans_l: Tensor, emission: Tensor) -> Tensor:
    """Edges of a hidden semi-Markov model: log Z is the log-likelihood of the observations.

    Parameters
    ----------
    init : Tensor of shape (C,) or (B, C)
        ``log P(z_1 = c)``, the label of the first segment; one for all sequences or one each.
    trans_z : Tensor of shape (C, C)
        ``trans_z[c, c'] = log P(next segment has label c' | this one has c)``.
    trans_l : Tensor of shape (C, K)
        ``trans_l[c, k] = log P(duration k | label c)``; index k is the duration, 0 unused.
    emission : Tensor of shape (B, N, K, C)
        ``log P(observations n .. n+k-1 | one segment of duration k with label c)``.

    Returns
    -------
    Tensor of shape (B, N, K, C, C)
        ``edge[b, n, k, c_dst, c_src]`` for N observations, that is N+1 nodes. A segment's label is
        the destination of its edge; the first has source 0 only, so that paths are segmentations,
        one to one.

    Raises
    ------
    ValueError
        If the shapes do not fit together; the message names the argument.

    References
    ----------
    S.-Z. Yu, Hidden semi-Markov models, Artificial Intelligence 2010.

    Examples
    --------
    >>> half = torch.tensor(0.5).log()
    >>> edges = hsmm_edges(
    ...     torch.zeros(1), torch.zeros(1, 1), torch.full((1, 3), half), torch.zeros(1, 4, 3, 1)
    ... )
    >>> edges.shape  # 4 observations, durations 1 and 2
    torch.Size([1, 4, 3, 1, 1])
    """
    given = {"init": init, "trans_z": trans_z, "trans_l": trans_l, "emission": emission}
    for name, value in given.items():
        check_tensor(name, value)
    num_labels = init.shape[-1] if init.dim() in (1, 2) else -1
    num_durations = emission.shape[2] if emission.dim() == 4 else -1
    shapes = {
        "init": (init, (*emission.shape[: init.dim() - 1], num_labels)),
        "trans_z": (trans_z, (num_labels, num_labels)),
        "trans_l": (trans_l, (num_labels, num_durations)),
        "emission": (emission, (*emission.shape[:2], num_durations, num_labels)),
    }
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"`{name}` must fit init (C,) or (B, C), trans_z (C, C), trans_l (C, K) and "
                f"emission (B, N, K, C); got {tuple(value.shape)}."
            )
    own = (emission + trans_l.T)[..., None]
    first = own[:, :1] + init[..., None, None, :, None]
    closed = torch.full_like(first, -math.inf).expand(*first.shape[:-1], num_labels - 1)
    return torch.cat([torch.cat([first, closed], -1), own[:, 1:] + trans_z.T], 1)
