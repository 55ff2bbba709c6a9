"""Time one peer on one problem, in a process that cannot see this repository.

Copied with ``measure.py`` into an empty folder and run there as
``python peer.py PEER JOB INPUTS.npz OUTPUT.json PEER_FOLDER BUDGET MAX_REPEATS MEMORY_LIMIT``.
Peers are black boxes: only their public call forms appear here, one exception stated below.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import measure
from torch import Tensor

Job = Callable[[], Tensor]
"""Does the job once and returns log Z, or the score of the best path, of shape (B,)."""


def _with_gradient(log_partition: Job, leaves: list[Tensor]) -> Job:
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = log_partition()
        value.sum().backward()
        return value

    return call


def flash_semicrf(inputs: dict[str, Tensor], job: str) -> Job:
    """Release 0.2.0: log Z by its streaming function, decoding by its module."""
    import flash_semicrf

    scores, transition, bias = inputs["scores"], inputs["transition"], inputs["duration_bias"]
    lengths, K = inputs["lengths"], bias.shape[0]
    if job == "decode":
        head = flash_semicrf.SemiMarkovCRFHead(num_classes=scores.shape[2], max_duration=K)
        state = {"transition": transition, "duration_dist.duration_bias": bias}
        head.load_state_dict(state)
        return lambda: head.decode_with_traceback(scores, lengths).scores
    cum_scores = torch.zeros(scores.shape[0], scores.shape[1] + 1, scores.shape[2])
    cum_scores[:, 1:] = scores.cumsum(1)

    def log_partition() -> Tensor:
        return flash_semicrf.semi_crf_streaming_forward(cum_scores, transition, bias, lengths, K)

    if job == "log_partition":
        return log_partition
    return _with_gradient(log_partition, [cum_scores, transition, bias])


def torch_struct(inputs: dict[str, Tensor], job: str) -> Job:
    """Edge tensors of all positions, durations and label pairs; a linear chain where K = 1."""
    import torch_struct

    if "edges" in inputs:
        return _torch_struct_edges(inputs["edges"])
    scores, transition, bias = inputs["scores"], inputs["transition"], inputs["duration_bias"]
    K = bias.shape[0]
    # The first segment's source label is free: log-sum-exp over it.
    first = transition.logsumexp(0)

    def chain() -> Tensor:
        """edge[b, n, c_dst, c_src]: label c_src at position n, c_dst at n + 1."""
        unary = scores + bias[0]
        edge = unary[:, 1:, :, None] + transition.T
        begin = (unary[:, 0] + first)[:, None, None, :]
        return torch.cat([edge[:, :1] + begin, edge[:, 1:]], 1)

    def semi_markov() -> Tensor:
        """edge[b, n, k, c_dst, c_src]: a segment of c_src over [n, n + k), then one of c_dst."""
        B, T, C = scores.shape
        cum_scores = torch.cat([scores.new_zeros(B, 1, C), scores.cumsum(1)], 1)
        blocks = [scores.new_full((B, T, C), -1e9)]
        for k in range(1, K + 1):
            content = cum_scores[:, k:] - cum_scores[:, :-k] + bias[k - 1]
            blocks.append(torch.nn.functional.pad(content, (0, 0, 0, k - 1), value=-1e9))
        edge = torch.stack(blocks, 2)[:, :, :, None, :] + transition.T[:, :]
        # An edge into position T closes the last segment: no transition follows it.
        for k in range(1, min(K, T) + 1):
            edge[:, T - k, k] -= transition.T
            edge[:, T - k, k, 1:] = -1e9
        edge[:, 0] += first
        return edge

    make = torch_struct.LinearChainCRF if K == 1 else torch_struct.SemiMarkovCRF

    def log_partition() -> Tensor:
        edge = chain() if K == 1 else semi_markov()
        distribution = make(edge)
        if job == "decode":
            return (distribution.argmax * edge).flatten(1).sum(1)
        return distribution.partition

    if job == "log_partition_gradient":
        return _with_gradient(log_partition, [scores, transition, bias])
    return log_partition


def _torch_struct_edges(edges: Tensor) -> Job:
    """One sequence after the other, each with its gradient: more at once need more memory.

    Its tree multiplies (K-1) C x (K-1) C matrices by way of all their terms: gibibytes a sequence.
    """
    import torch_struct

    engine = torch_struct.SemiMarkov(torch_struct.LogSemiring)
    leaves = [edge[None].clone().requires_grad_() for edge in edges]

    def call() -> Tensor:
        values = []
        for leaf in leaves:
            leaf.grad = None
            value = engine.sum(leaf)
            value.sum().backward()
            values.append(value.detach())
        return torch.cat(values)

    return call


def pytorch_crf(inputs: dict[str, Tensor], job: str) -> Job:
    """A linear CRF, K = 1."""
    import torchcrf

    scores, transition, bias = inputs["scores"], inputs["transition"], inputs["duration_bias"]
    model = torchcrf.CRF(scores.shape[2], batch_first=True)
    with torch.no_grad():
        model.transitions.copy_(transition)
        model.start_transitions.copy_(transition.logsumexp(0))
        model.end_transitions.zero_()
    emissions = (scores + bias[0]).transpose(0, 1).contiguous()
    mask = torch.ones(emissions.shape[:2], dtype=torch.bool)

    # The public call adds the score of a gold path, which costs it half as much again. Its
    # normalizer alone is the same work as ours, and the stricter comparison.
    def log_partition() -> Tensor:
        return model._compute_normalizer(emissions, mask)

    if job != "log_partition_gradient":
        raise ValueError(f"pytorch-crf has no call for the job {job!r} here")
    model.zero_grad()
    return _with_gradient(log_partition, [emissions, *model.parameters()])


PEERS = {
    "flash-semicrf": ("flash_semicrf", flash_semicrf),
    "torch-struct": ("torch_struct", torch_struct),
    "pytorch-crf": ("torchcrf", pytorch_crf),
}


def _limit_memory(limit: int) -> None:
    """Let an allocation beyond the limit fail here, rather than the whole machine."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _describe(error: Exception, limit: int) -> str:
    """One line of what a peer raised; that it lacks memory, in GiB."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    asked = re.search(r"tried to allocate (\d+) bytes", line)
    if asked is None:
        return f"failed: {line}"
    gib = [count / 2**30 for count in (int(asked[1]), limit)]
    return f"failed: one tensor of {gib[0]:.3g} GiB, {gib[1]:.3g} GiB allowed"


def _shorten(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny problem of the same form: one sequence of 4 positions, 2 durations."""
    if "edges" in inputs:
        return {"edges": inputs["edges"][:1, :3, :3].clone()}
    return {
        "scores": inputs["scores"][:1, :4].clone(),
        "transition": inputs["transition"].clone(),
        "duration_bias": inputs["duration_bias"][:2].clone(),
        "lengths": torch.tensor([4]),
    }


def main(argv: list[str]) -> None:
    """Measure and write the record; an exception of the peer is part of the record."""
    peer, job, inputs_path, output_path, folder, budget, max_repeats, memory_limit = argv
    warnings.simplefilter("ignore")
    name, prepare = PEERS[peer]
    location = Path(importlib.import_module(name).__file__).resolve()
    if Path(folder).resolve() not in location.parents:
        raise SystemExit(f"{name} came from {location}, not from {folder}")
    inputs = {key: torch.from_numpy(value) for key, value in np.load(inputs_path).items()}
    _limit_memory(int(memory_limit))
    with torch.set_grad_enabled(job.endswith("_gradient")):
        try:
            record, value = measure(
                prepare(inputs, job),
                prepare(_shorten(inputs), job),
                budget_seconds=float(budget),
                max_repeats=int(max_repeats),
            )
        except (RuntimeError, MemoryError) as error:
            record = {"status": _describe(error, int(memory_limit))}
        else:
            record |= {"status": "ok", "value": value.detach().double().tolist()}
    Path(output_path).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
