"""Names, signatures and call forms in the documents of release 0.2.0: they keep working."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import flash_semicrf
from flash_semicrf import (
    SemiMarkov,
    SemiMarkovCRFHead,
    UncertaintySemiMarkovCRFHead,
    create_duration_distribution,
    semi_crf_streaming_forward,
)
from flash_semicrf.duration import CallableDuration, GeometricDuration, PoissonDuration
from flash_semicrf.semirings import EntropySemiring, LogSemiring, MaxSemiring
from flash_semicrf.semirings.checkpoint import CheckpointSemiring, CheckpointShardSemiring
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import message_of

EMPTY = inspect.Parameter.empty
# `use_triton`, documented before `backend`, is taken by name and by place: `test_use_triton.py`.
HEAD = {"backend": "auto"}
HIDDEN = {"hidden_states": EMPTY, "lengths": EMPTY}
CUMULATIVE = dict.fromkeys(("cum_scores", "transition", "duration_bias"), EMPTY)

# By name, the documented parameters with their defaults. Others may follow them.
SIGNATURES = {
    "SemiMarkovCRFHead": {
        "num_classes": EMPTY,
        "max_duration": EMPTY,
        "hidden_dim": None,
        "init_scale": 0.1,
        "duration_distribution": None,
        "edge_memory_threshold": 8e9,
        "num_warps": 4,
    },
    "SemiMarkovCRFHead.forward": HIDDEN | HEAD,
    "SemiMarkovCRFHead.compute_loss": HIDDEN | {"labels": EMPTY} | HEAD | {"reduction": "mean"},
    "SemiMarkovCRFHead.decode": HIDDEN | HEAD,
    # Documented as 10000; decoding has no limit here.
    "SemiMarkovCRFHead.decode_with_traceback": HIDDEN | {"max_traceback_length": None},
    "SemiMarkovCRFHead.parameter_penalty": {"p": 2.0},
    "UncertaintySemiMarkovCRFHead.compute_boundary_marginals": HIDDEN
    | {"backend": "auto", "normalize": True},
    "UncertaintySemiMarkovCRFHead.compute_position_marginals": HIDDEN,
    "UncertaintySemiMarkovCRFHead.compute_entropy_streaming": HIDDEN,
    "UncertaintySemiMarkovCRFHead.compute_entropy_exact": HIDDEN,
    "UncertaintySemiMarkovCRFHead.compute_loss_uncertainty_weighted": HIDDEN
    | {
        "labels": EMPTY,
        "uncertainty_weight": 1.0,
        "focus_mode": "high_uncertainty",
        "reduction": "mean",
    },
    "semi_crf_streaming_forward": CUMULATIVE
    | {"lengths": EMPTY, "K": EMPTY, "semiring": "log", "use_triton": True, "num_warps": 4},
    "streaming.semi_crf_streaming_forward": CUMULATIVE | {"lengths": EMPTY, "K": EMPTY},
    "streaming.compute_edge_block_streaming": CUMULATIVE | {"start": EMPTY, "k": EMPTY},
    "create_duration_distribution": {
        "distribution": EMPTY,
        "max_duration": EMPTY,
        "num_classes": EMPTY,
    },
    "SemiMarkov": {"semiring": EMPTY},
    "SemiMarkov.logpartition": {
        "log_potentials": EMPTY,
        "lengths": None,
        "force_grad": False,
        "use_linear_scan": None,
        "use_vectorized": False,
        "use_banded": False,
    },
    "SemiMarkov.marginals": {"log_potentials": EMPTY, "lengths": None},
    "SemiMarkov.hsmm": dict.fromkeys(("init", "trans_z", "trans_l", "emission"), EMPTY),
    "Segment": {"start": EMPTY, "end": EMPTY, "label": EMPTY, "score": 0.0},
    "ViterbiResult": {"scores": EMPTY, "segments": EMPTY},
    "BandedMatrix": {"data": EMPTY, "lu": EMPTY, "ld": EMPTY, "fill": 0.0},
    "BandedMatrix.from_dense": {"dense": EMPTY, "lu": EMPTY, "ld": EMPTY, "fill": 0.0},
    "BandedMatrix.to_dense": {},
    "BandedMatrix.transpose": {},
    "BandedMatrix.multiply_log": {"other": EMPTY},
    "BandedMatrix.multiply_max": {"other": EMPTY},
    "BlockTriangularMatrix": {"values": EMPTY, "block_indices": EMPTY, "K": EMPTY, "C": EMPTY},
    "BlockTriangularMatrix.from_dense": {
        "dense": EMPTY,
        "K": EMPTY,
        "C": EMPTY,
        "span": EMPTY,
        "duration_mask": None,
    },
    "BlockTriangularMatrix.to_dense": {"semiring": None},
    "block_triang_matmul": dict.fromkeys(("left", "right", "semiring", "span"), EMPTY),
    "measure_effective_bandwidth": {"adj": EMPTY, "fill_value": None},
    "snake_ordering": {"K": EMPTY, "C": EMPTY},
    "rcm_ordering_from_adjacency": {"adj": EMPTY},
    "apply_permutation": {"potentials": EMPTY, "perm": EMPTY},
}

# Documented without a signature.
OTHERS = {
    "": [
        "CallableDuration",
        "GeometricDuration",
        "LearnedDuration",
        "NegativeBinomialDuration",
        "PoissonDuration",
        "UncertaintySemiMarkovCRFHead",
        "UniformDuration",
    ],
    "streaming": [
        "HAS_TRITON",
        "NEG_INF",
        "SemiCRFStreaming",
        "SemiCRFStreamingTriton",
        "launch_streaming_triton_backward",
        "launch_streaming_triton_kernel",
        "launch_streaming_triton_kernel_max_bp",
        "semi_crf_streaming_viterbi_triton",
        "semi_crf_streaming_viterbi_with_backpointers",
    ],
    "semirings": [
        "CrossEntropySemiring",
        "EntropySemiring",
        "KLDivergenceSemiring",
        "KMaxSemiring",
        "LogSemiring",
        "MaxSemiring",
        "StdSemiring",
    ],
    "semirings.checkpoint": ["CheckpointSemiring", "CheckpointShardSemiring"],
}


def documented(path: str):
    """The object of a dotted path below flash_semicrf."""
    found = flash_semicrf
    for name in path.split("."):
        if not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_as_documented(path):
    parameters = inspect.signature(documented(path)).parameters
    given = {n: p.default for n, p in parameters.items() if n != "self"}
    wanted = SIGNATURES[path]
    assert list(given.items())[: len(wanted)] == list(wanted.items())
    rest = list(given.items())[len(wanted) :]
    assert all(
        value is not EMPTY or parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        for name, value in rest
    )


@pytest.mark.parametrize("module", OTHERS)
def test_names_are_where_they_are_documented(module):
    for name in OTHERS[module]:
        assert documented(f"{module}.{name}" if module else name) is not None


# Call forms

SCORES, LENGTHS = torch.randn(2, 9, 3), torch.tensor([9, 6])


def test_deprecated_choice_of_the_backend_warns():
    head = UncertaintySemiMarkovCRFHead(3, 4)
    expected = head.compute_boundary_marginals(SCORES, LENGTHS)
    for value, backend in ((True, "streaming"), (False, "exact")):
        message = f'`use_streaming` is deprecated; pass backend="{backend}".'
        with pytest.warns(DeprecationWarning, match=message):
            found = head.compute_boundary_marginals(SCORES, LENGTHS, use_streaming=value)
        assert_close(found, expected)
    call = head.compute_boundary_marginals
    message = message_of(ValueError, call, SCORES, LENGTHS, backend="exact", use_streaming=True)
    assert message == "`backend`='exact' contradicts `use_streaming`=True."


@pytest.mark.parametrize(
    "options", [{"num_warps": 3}, {"num_warps": 6}, {"accum_dtype": torch.float32}]
)
def test_options_of_kernels_change_nothing(options):
    heads = []
    for given in ({}, options):
        torch.manual_seed(0)
        heads.append(SemiMarkovCRFHead(3, 4, **given))
    plain, other = (head(SCORES, LENGTHS) for head in heads)
    assert torch.equal(plain["partition"], other["partition"])
    head = heads[0]
    shared = (plain["cum_scores"], head.transition, head.duration_bias, LENGTHS, 4)
    found = semi_crf_streaming_forward(*shared, **options)
    assert_close(found, plain["partition"], torch.float32)
    for call in (
        lambda **given: SemiMarkovCRFHead(3, 4, **given),
        lambda **given: semi_crf_streaming_forward(*shared, **given),
    ):
        assert message_of(TypeError, call, accum_dtype="float32") == (
            "`accum_dtype` must be a floating-point torch.dtype; got 'float32'."
        )


def test_penalty_has_no_constant_for_durations_that_are_not_learned():
    for duration in (
        "uniform",
        GeometricDuration(4, 3, learnable=False),
        lambda k: -k[:, None].expand(-1, 3),
    ):
        head = SemiMarkovCRFHead(3, 4, duration_distribution=duration)
        assert_close(head.parameter_penalty(), head.transition.square().sum())
    head = SemiMarkovCRFHead(3, 4)
    both = head.transition.square().sum() + head.duration_bias.square().sum()
    with torch.no_grad():
        assert_close(head.parameter_penalty(), both)


def test_other_names_of_arguments():
    def slopes(durations):
        return -durations[:, None].expand(-1, 3)

    assert_close(CallableDuration(4, 3, func=slopes)(), CallableDuration(4, 3, slopes)())
    assert_close(
        create_duration_distribution("callable", 4, 3, func=slopes)(), slopes(torch.arange(1.0, 5))
    )
    assert message_of(TypeError, CallableDuration, 4, 3, slopes, func=slopes) == (
        "`function` and `func` are one argument; got both."
    )
    for name in ("geometric", "poisson", "negative_binomial"):
        fixed = create_duration_distribution(name, 4, 3, learn_rate=False)
        assert not list(fixed.parameters()) and fixed.learnable is False
        assert list(create_duration_distribution(name, 4, 3, learn_rate=True).parameters())
    assert not list(PoissonDuration(4, 3, learn_rate=False).parameters())


def test_examples_of_the_reference_run():
    crf = SemiMarkovCRFHead(
        num_classes=4, max_duration=6, hidden_dim=8, duration_distribution="geometric"
    )
    hidden, lengths = torch.randn(2, 30, 8), torch.full((2,), 30)
    labels = torch.arange(30).div(4, rounding_mode="floor").remainder(4).expand(2, 30)
    assert crf(hidden, lengths)["partition"].shape == (2,)
    (crf.compute_loss(hidden, lengths, labels) + 0.01 * crf.parameter_penalty()).backward()
    assert crf.decode(hidden, lengths).shape == (2,)
    segments = crf.decode_with_traceback(hidden, lengths).segments[0]
    assert sum(segment.end - segment.start + 1 for segment in segments) == 30

    projected = torch.randn(2, 30, 4)
    cum_scores = torch.zeros(2, 31, 4, dtype=torch.float32)
    cum_scores[:, 1:] = torch.cumsum(
        (projected - projected.mean(dim=1, keepdim=True)).float(), dim=1
    )
    duration = create_duration_distribution(
        "geometric", max_duration=6, num_classes=4, init_logit=-1.0
    )
    partition = semi_crf_streaming_forward(cum_scores, torch.zeros(4, 4), duration(), lengths, 6)
    assert partition.shape == (2,)

    edge = torch.randn(2, 5, 3, 2, 2)
    for semiring, size in ((LogSemiring, 1), (MaxSemiring, 1), (EntropySemiring, 2)):
        v, edges, charts = SemiMarkov(semiring).logpartition(edge, lengths=torch.tensor([6, 4]))
        assert v.shape == (size, 2) and len(edges) == 1 and charts is None
    for semiring in (
        CheckpointSemiring(LogSemiring, min_size=1),
        CheckpointShardSemiring(LogSemiring, 64, 1),
    ):
        assert_close(SemiMarkov(semiring).sum(edge), SemiMarkov(LogSemiring).sum(edge))
