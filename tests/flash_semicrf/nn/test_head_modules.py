"""The head's modules: replaced, adapted, pruned, hooked, quantised, made on the meta device."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from flash_semicrf import SemiMarkovCRFHead
from flash_semicrf.duration import GeometricTail, LearnedDuration
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import message_of

C, K, D, T = 2, 4, 3, 6
LENGTHS = torch.tensor([6, 4])
LABELS = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])


def make_head(**options) -> SemiMarkovCRFHead:
    torch.manual_seed(0)
    return SemiMarkovCRFHead(C, K, D, **options)


def hidden(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


class LowRank(nn.Module):
    """An adapter of the usual kind: the layer that it wraps, frozen, and a trained correction."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 1, bias=False)
        self.up = nn.Linear(1, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def replace(make):
    def change(head, name):
        setattr(head, name, make(getattr(head, name)))

    return change


def pruned(head, name):
    prune.l1_unstructured(getattr(head, name), "weight", 0.5)


def reparametrized(head, name):
    parametrize.register_parametrization(getattr(head, name), "weight", nn.Tanh())


def hooked(head, name):
    getattr(head, name).register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = {
    "adapter": replace(LowRank),
    "no bias": replace(lambda layer: nn.Linear(D, layer.out_features, bias=False)),
    "two layers": replace(
        lambda layer: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, layer.out_features))
    ),
    "pruned": pruned,
    "parametrized": reparametrized,
    "hooked": hooked,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_projections_are_called(change, dtype):
    head, wide = make_head(boundary_scores=True), make_head(boundary_scores=True)
    for one in (head, wide):
        torch.manual_seed(2)
        for name in ("projection", "boundary_projection"):
            CHANGES[change](one, name)
    # The reference: the same modules in float32, called by hand on the same numbers.
    head, wide = head.to(dtype), wide.to(dtype).float()
    x = hidden(dtype)
    problem, _ = head.potentials(x, torch.tensor([T, T]), centered=False)
    assert_close(problem.scores, wide.projection(x.float()))
    boundary = torch.cat([problem.start_scores, problem.end_scores], -1)
    assert_close(boundary, wide.boundary_projection(x.float()))
    learned = [p for p in head.projection.parameters() if p.requires_grad]
    for _ in range(2):
        head.zero_grad()
        head.compute_loss(x, LENGTHS, LABELS).backward()
        assert all(p.dtype == dtype and bool((p.grad != 0).any()) for p in learned)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_dynamic_quantisation_is_used():
    head = make_head()
    small = torch.ao.quantization.quantize_dynamic(head, {nn.Linear}, dtype=torch.qint8)
    problem, _ = small.potentials(hidden(), torch.tensor([T, T]), centered=False)
    assert_close(problem.scores, small.projection(hidden()))
    assert not torch.equal(problem.scores, head.projection(hidden()))


@pytest.mark.parametrize(
    ("module", "kind", "got"),
    [
        (nn.Linear(D, 5), ValueError, "(2, 6, 5)"),
        (nn.LSTM(D, C), TypeError, "tuple"),
        (nn.Flatten(), ValueError, "(2, 18)"),
    ],
)
def test_what_a_projection_returns_is_checked(module, kind, got):
    head = make_head()
    head.projection = module
    assert message_of(kind, head, hidden(), LENGTHS) == (
        f"`projection` must return a floating Tensor of shape (2, 6, 2); got {got}."
    )


def test_own_parameters_and_those_of_durations_may_be_pruned_and_parametrized():
    head = make_head(duration_distribution="geometric")
    prune.l1_unstructured(head, "transition", 0.5)
    prune.l1_unstructured(head.duration_distribution, "logit", 0.5)
    for _ in range(2):
        head.compute_loss(hidden(), LENGTHS, LABELS).backward()
    problem, _ = head.potentials(hidden(), LENGTHS)
    assert int((problem.transition == 0).sum()) == 2
    assert_close(problem.transition, head.transition_orig * head.transition_mask)
    assert head.parameter_penalty().requires_grad

    tanh = make_head(duration_distribution="negative_binomial")
    parametrize.register_parametrization(tanh.duration_distribution, "log_r", nn.Tanh())
    plain = make_head(duration_distribution="negative_binomial")
    plain.duration_distribution.log_r.data = tanh.duration_distribution.log_r.detach()
    assert_close(tanh.duration_bias, plain.duration_bias)


# The meta device

MODELS = {
    "plain": {},
    "constraints": {
        "min_duration": {1: 2},
        "transition_constraints": [[True, True], [True, False]],
    },
    "uniform": {"duration_distribution": "uniform", "initial_scores": True, "final_scores": True},
    "function": {"duration_distribution": lambda k: -k[:, None].expand(-1, C), "min_duration": 2},
    "fixed": {"duration_distribution": LearnedDuration, "duration_tail": [-0.5, -torch.inf]},
    "geometric": {"duration_distribution": "geometric", "duration_tail": "geometric"},
    "tail": {"duration_distribution": "poisson", "duration_tail": "geometric"},
    "negative binomial": {"duration_distribution": "negative_binomial", "boundary_scores": True},
}


def buffers_anew(head: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """As loaders do that set tensors one by one: what is not saved is allocated, and left so."""
    head.load_state_dict(state, assign=True)
    for module in head.modules():
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))


LOADERS = {
    "to_empty": lambda head, state: head.to_empty(device="cpu").load_state_dict(state),
    "assign": lambda head, state: head.load_state_dict(state, assign=True),
    "buffers anew": buffers_anew,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_head_made_on_the_meta_device_is_loaded(model, loader):
    trained = make_head(**MODELS[model])
    with torch.device("meta"):
        head = SemiMarkovCRFHead(C, K, D, **MODELS[model])
    assert all(p.is_meta for p in head.parameters())
    LOADERS[loader](head, trained.state_dict())
    for one in (head, copy.deepcopy(head)):
        found, expected = one(hidden(), LENGTHS), trained(hidden(), LENGTHS)
        assert_close(found["partition"], expected["partition"])
        assert (
            one.decode_with_traceback(hidden(), LENGTHS).segments
            == trained.decode_with_traceback(hidden(), LENGTHS).segments
        )


def test_numbers_given_are_on_the_default_device():
    with torch.device("meta"):
        tail = GeometricTail(C, [-0.5, -torch.inf])
        learned = LearnedDuration(K, C, init_bias=torch.zeros(K, C, device="cpu"))
        with pytest.raises(ValueError, match="`log_rate` must be finite or -inf"):
            GeometricTail(C, [torch.nan, 0.0])
    assert tail.log_rate.is_meta and learned.duration_bias.is_meta


def test_masks_move_with_the_head_and_are_pickled():
    head = make_head(**MODELS["constraints"])
    copied = pickle.loads(pickle.dumps(head))
    assert torch.equal(copied.allowed_durations, head.allowed_durations)
    assert copied.to("meta").allowed_transitions.is_meta
    back = copied.to_empty(device="cpu")
    assert torch.equal(back.allowed_transitions, head.allowed_transitions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_head()(torch.empty(2, T, D, device="meta"), LENGTHS),
            "`hidden_states` must hold data; got a tensor on the meta device.",
        ),
        (
            lambda: make_head(
                transition_constraints=torch.empty(C, C, dtype=torch.bool, device="meta")
            ),
            "`transition_constraints` must hold data; got a tensor on the meta device.",
        ),
        (
            lambda: make_head(min_duration=torch.empty(C, dtype=torch.long, device="meta")),
            "`min_duration` must hold data; got a tensor on the meta device.",
        ),
    ],
)
def test_tensors_without_data_are_refused(call, message):
    assert message_of(ValueError, call) == message
