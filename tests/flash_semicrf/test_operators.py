"""Models compiled by `torch.compile` and exported by `torch.export`: the results of eager code."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import grad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from flash_semicrf import (
    Constraints,
    Potentials,
    SemiMarkovCRFHead,
    log_partition,
    segment_marginals,
    viterbi,
    viterbi_labels,
)
from flash_semicrf.inference import operators
from flash_semicrf.inference.flags import validated
from flash_semicrf.inference.viterbi import best_segments, viterbi_table
from flash_semicrf.inference.viterbi_labels import best_labels
from flash_semicrf.nn.operators import checked_gold, checked_lengths, gold_labels
from flash_semicrf.problem.dense import dense_to_table, score_dense, table_to_dense
from flash_semicrf.problem.potentials import NAMES, score_segments
from flash_semicrf.problem.segments import labels_to_table
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import message_of, with_gradients

# The compiler warns of its own parts, and the traced code may be compiled anew for every test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

INDUCTOR = pytest.param(
    "static",
    "inductor",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++"),
)
B, T, D, C, K = 3, 12, 5, 3, 4


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Tagger(nn.Module):
    """An encoder with a head: the loss of a batch."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, 6), nn.Tanh())
        self.head = SemiMarkovCRFHead(C, K, 6, **options)

    def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return self.head.compute_loss(self.encoder(x), lengths, labels)


class Decoder(Tagger):
    """The same: best segmentations as tensors of static shape."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head.decode_labels(self.encoder(x), lengths)


class ByDuration(nn.Module):
    """An encoder and transitions by duration: log Z of a batch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(D, C)
        self.transition = nn.Parameter(torch.randn(K, C, C))
        self.duration_bias = nn.Parameter(torch.randn(K, C))

    def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        p = Potentials(self.encoder(x), self.transition, self.duration_bias, lengths)
        return log_partition(p).sum()


def batch(batch_size=B, num_positions=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, num_positions, D, generator=generator)
    lengths = torch.randint(1, num_positions + 1, (batch_size,), generator=generator)
    lengths[0] = num_positions
    # Runs of two positions; what comes after the end is no label.
    labels = torch.randint(C, (batch_size, (num_positions + 1) // 2), generator=generator)
    labels = labels.repeat_interleave(2, 1)[:, :num_positions].contiguous()
    labels[torch.arange(num_positions) >= lengths[:, None]] = -100
    x[torch.arange(num_positions) >= lengths[:, None]] = torch.nan
    return x.nan_to_num(7.0), lengths, labels


def assert_same_step(model: nn.Module, compiled, given):
    """Loss and the gradients of all parameters."""
    parameters = list(model.parameters())
    expected, actual = model(*given), compiled(*given)
    assert_close(actual, expected, torch.float32)
    pairs = zip(
        torch.autograd.grad(actual, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        assert_close(found, wanted, torch.float32)


MODELS = {
    "static": Tagger,
    "duration prior": lambda: Tagger(duration_distribution="poisson", min_duration=1),
    "all options": lambda: Tagger(
        boundary_scores=True,
        initial_scores=True,
        final_scores=True,
        duration_tail="geometric",
        transition_constraints=torch.ones(C, C, dtype=torch.bool),
    ),
    "centred by sequence": lambda: Tagger(centering="sequence"),
    "by duration": ByDuration,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*gold segments are longer")
def test_a_compiled_loss_has_the_gradients_of_eager_code(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    assert_same_step(model, torch.compile(model, fullgraph=True, backend="aot_eager"), batch())


@pytest.mark.parametrize(("name", "backend"), [("all options", "aot_eager"), INDUCTOR])
@pytest.mark.filterwarnings("ignore:.*gold segments are longer")
def test_shapes_may_change(name, backend):
    torch.manual_seed(0)
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for number, shape in enumerate([(3, 12), (2, 7), (5, 30)]):
        assert_same_step(model, compiled, batch(*shape, seed=number))


def test_compiled_results_without_a_graph():
    model = Tagger().eval()
    x, lengths, labels = batch()
    hidden = model.encoder(x).detach()

    def results(hidden, lengths):
        found = model.head(hidden, lengths)
        return found["partition"], found["cum_scores"], model.head.decode(hidden, lengths)

    with torch.no_grad():
        expected = results(hidden, lengths)
        actual = torch.compile(results, fullgraph=True, backend="aot_eager")(hidden, lengths)
    for found, wanted in zip(actual, expected, strict=True):
        assert not found.requires_grad
        assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize("name", ["static", "all options"])
def test_compiled_marginals(name):
    torch.manual_seed(0)
    model, (x, lengths, _) = MODELS[name](), batch()

    def marginals(x):
        return tuple(model.head.marginals(model.encoder(x), lengths))

    actual = torch.compile(marginals, fullgraph=True, backend="aot_eager")(x)
    for found, wanted in zip(actual, marginals(x), strict=True):
        assert found.dtype == wanted.dtype and not found.requires_grad
        assert_close(found, wanted, torch.float32)


def test_a_compiled_decoded_score_is_differentiable():
    model = Tagger(boundary_scores=True, final_scores=True, duration_tail=-0.5)

    def score(x, lengths, labels):
        return model.head.decode(model.encoder(x), lengths).sum()

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    given, parameters = batch(), list(model.parameters())
    expected, actual = score(*given), compiled(*given)
    assert_close(actual, expected, torch.float32)
    for found, wanted in zip(
        torch.autograd.grad(actual, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert_close(found, wanted, torch.float32)


@pytest.mark.filterwarnings("ignore:.*runs of equal known labels are longer")
def test_the_rest_is_compiled_around():
    """Without ``fullgraph``, what has no operator runs between compiled parts."""
    model, (x, lengths, labels) = Tagger(), batch()
    labels[0, :4] = -100
    known = Constraints(boundaries=[[2], [], []])

    def rest(x):
        hidden = model.encoder(x)
        loss = model.head.compute_loss(hidden, lengths, labels, ignore_index=-100)
        marginals = model.head.marginals(hidden, lengths).position
        scores, found, _ = model.head.decode_labels(hidden, lengths, constraints=known)
        return loss, marginals, scores, found

    expected = rest(x)
    for found, wanted in zip(torch.compile(rest, backend="aot_eager")(x), expected, strict=True):
        assert_close(found, wanted, torch.float32)


# Errors


def test_a_compiled_model_names_values_that_are_not_allowed():
    model = Tagger(long_segments="error")
    x, lengths, labels = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, lengths, labels)
    wrong = x.clone()
    wrong[0, 3, 2] = torch.nan
    cases = [
        ((wrong, lengths, labels), "`hidden_states` must be finite or -inf"),
        ((x, lengths + T, labels), "`lengths` must be in [1, T=12]; got"),
        ((x, lengths, labels.clamp(min=5)), "`labels` must be in [0, C-1=2]; got 5"),
        ((x, lengths, torch.zeros_like(labels)), "A gold segment is longer than `max_duration`=4"),
    ]
    for given, expected in cases:
        assert message_of(ValueError, compiled, *given).startswith(expected)
        with pytest.raises(ValueError) as eager:
            model(*given)
        assert str(eager.value).startswith(expected)


def test_a_compiled_model_names_a_forbidden_gold_segment():
    allowed = ~torch.eye(C, dtype=torch.bool)
    model = Tagger(transition_constraints=allowed, min_duration=2)
    x, lengths, _ = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.arange(T).remainder(C).expand(B, T)  # every segment is too short
    message = message_of(ValueError, compiled, x, lengths, labels)
    assert message.startswith(message_of(ValueError, model, x, lengths, labels))
    assert "the segment at positions 0..0 with label 0" in message


def test_a_compiled_decoder_names_infeasible_sequences():
    p = random_problem(ragged=False)

    def best(scores):
        return viterbi_labels(p.replace(scores=scores))

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    compiled(p.scores)
    scores = p.scores.clone()
    scores[1, 0] = -torch.inf
    message = message_of(ValueError, compiled, scores)
    assert message.startswith("No segmentation is feasible for sequences [1]")


def test_parameters_that_are_not_finite_have_no_compiled_log_z():
    p = random_problem()
    compiled = torch.compile(
        lambda t: log_partition(p.replace(transition=t)), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(p.transition), log_partition(p))
    message = message_of(ValueError, compiled, torch.full_like(p.transition, torch.nan))
    assert message.startswith("`transition` must be finite or -inf (forbidden); got nan")


def test_wrong_forms_are_refused_while_tracing():
    p = random_problem()
    compiled = torch.compile(
        lambda t: log_partition(p.replace(transition=t)), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="`transition` must have shape"):
        compiled(torch.zeros(5, 5))


def test_second_derivatives_are_refused():
    p = random_problem()
    scores = p.scores.clone().requires_grad_()
    rest = arguments(p)[1:]
    log_z = torch.ops.flash_semicrf.log_partition("auto", False, (), p.lengths, None, scores, *rest)
    (first,) = torch.autograd.grad(log_z.sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    compiled = torch.compile(
        lambda s: log_partition(p.replace(scores=s)).sum(), fullgraph=True, backend="aot_eager"
    )
    (first,) = torch.autograd.grad(compiled(scores), scores, create_graph=True)
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


# Operators


PROBLEMS = {
    "plain": random_problem(),
    "all options": random_problem(boundary=True, ends=True, tail=True, forbid=0.05),
    "by duration": random_problem(by_duration=True, ends=True),
    "float32": random_problem(dtype=torch.float32, boundary=True),
    "half": random_problem(dtype=torch.bfloat16),
    "K > T": random_problem(num_positions=3, max_duration=6),
}


def arguments(p: Potentials) -> list[Tensor | None]:
    return [p.parameters().get(name) for name in NAMES]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_log_partition_is_an_operator(name, backend):
    p = PROBLEMS[name]
    given = (backend, False, (), p.lengths, None)
    opcheck(operators.log_partition, (*given, *arguments(p)))
    opcheck(operators.log_partition, (*given, *arguments(with_gradients(p))))
    if name == "by duration":
        only = p.replace(transition=p.transition.clone().requires_grad_())
        opcheck(operators.log_partition, (*given, *arguments(only)))
    wanted = [value is not None for value in arguments(p)]
    opcheck(operators.log_partition_with_gradients, (*given, wanted, *arguments(p)))
    # Those of starts and ends exist without scores of them.
    wanted[3:5] = [True, True]
    opcheck(operators.log_partition_with_gradients, (*given, wanted, *arguments(p)))


@pytest.mark.parametrize("validate", ["values", "shapes"])
@pytest.mark.parametrize("name", ["plain", "all options", "by duration", "float32"])
def test_eager_code_calls_the_operators(name, validate):
    p, bad = validated(with_gradients(PROBLEMS[name]), "auto", validate)
    given = ("numba", True, p.known_range(), p.lengths, bad)
    if name == "plain":  # others hold what forbids, and are changed after the check
        assert (len(p.known_range()) == 2) == (validate == "values")
    # Traced code checks the problem inside: see above for the other checks.
    tests = ("test_schema", "test_autograd_registration")
    opcheck(operators.log_partition, (*given, *arguments(p)), test_utils=tests)
    log_z = operators.log_partition(*given, *arguments(p))
    assert_close(log_z, log_partition(PROBLEMS[name], validate=validate))
    with torch.no_grad():
        segments = best_segments("numba", False, (), p.lengths, bad, *arguments(p))
        opcheck(best_segments, ("numba", False, (), p.lengths, bad, *arguments(p)))
    for found, expected in zip(segments, [*flat_table(viterbi_table(p))], strict=True):
        assert torch.equal(found, expected)


class Called(TorchDispatchMode):
    """Names of the operators of this library that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flash_semicrf":
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_eager_calls_make_one_turn_through_the_dispatcher():
    p = random_problem()
    leaves = with_gradients(p)
    kernels = "log_partition_with_gradients"
    calls = {
        "log Z": (lambda: log_partition(p), [kernels]),
        "gradient": (
            lambda: torch.autograd.grad(log_partition(leaves).sum(), leaves.scores),
            [kernels, "scaled_gradients"],
        ),
        "marginals": (lambda: segment_marginals(p), [kernels]),
        "segments": (lambda: viterbi(p), ["best_segments"]),
        "labels": (lambda: viterbi_labels(p), ["best_segments"]),
        "reference": (lambda: log_partition(p, "reference"), []),
    }
    for name, (call, expected) in calls.items():
        with Called() as called:
            call()
        assert called.names == expected, name


def flat_table(found):
    scores, table = found
    return scores, *table


@pytest.mark.parametrize("bad", [None, torch.tensor([False, True, False])])
@pytest.mark.parametrize("backend", ["auto", "numba"])
def test_gradients_are_scaled_by_an_operator(backend, bad):
    wanted = [name in ("scores", "transition") for name in NAMES]
    gradients = [torch.randn(3, 5, 2), torch.randn(3, 2, 2).double()]
    weight = torch.tensor([1.0, 2.0, 0.0]).double()
    dtypes = [1, 1]  # float32
    finite = weight if bad is None else weight.masked_fill(bad, 0.0)
    opcheck(operators.scaled_gradients, (backend, finite, bad, wanted, gradients, dtypes))
    by_position, shared = operators.scaled_gradients(
        backend, weight, bad, wanted, gradients, dtypes
    )
    assert shared.dtype == torch.float32 and torch.equal(by_position[0], gradients[0][0])
    assert by_position[1].isnan().all() == shared.isnan().all() == (bad is not None)
    assert by_position[2].eq(0.0).all()


def test_gradients_that_share_memory_are_taken_apart(monkeypatch):
    p = PROBLEMS["all options"]
    backend = BACKENDS["numba"]
    compute = backend.gradients

    def sharing(potentials, wanted):
        log_z, found = compute(potentials, wanted)
        names = ["initial_scores", "final_scores"]
        joined = torch.stack([found[name] for name in names])
        return log_z, found | dict(zip(names, joined, strict=True))

    wanted = [value is not None for value in arguments(p)]
    given = ("auto", False, (), p.lengths, None, wanted, *arguments(p))
    _, expected = operators.log_partition_with_gradients(*given)
    monkeypatch.setattr(backend, "gradients", sharing)
    _, actual = operators.log_partition_with_gradients(*given)
    for found, value in zip(actual, expected, strict=True):
        assert torch.equal(found, value)
    assert len({value.untyped_storage().data_ptr() for value in actual}) == len(actual)


@pytest.mark.parametrize("name", PROBLEMS)
def test_viterbi_is_an_operator(name):
    p = PROBLEMS[name]
    opcheck(best_labels, ("auto", p.lengths, *arguments(p)))


@pytest.mark.parametrize("length", [T, 4])
def test_the_checks_of_the_head_are_operators(length):
    x, _, labels = batch()
    lengths = torch.tensor([length, 3, 2])
    labels = labels.clamp(min=0)
    opcheck(checked_lengths, (x, lengths))
    opcheck(checked_lengths, (x.transpose(0, 1).contiguous().transpose(0, 1), lengths.int()))
    opcheck(gold_labels, (labels, lengths, None, C, 20, "split"))
    p = random_problem(B, T, K, C, ragged=False)
    dense = gold_labels(labels, p.lengths, torch.ones(C, dtype=torch.bool), C, K, "split")
    opcheck(checked_gold, (torch.zeros(B), *dense, p.lengths, *arguments(p)))


# Segmentations as tensors of static shape


@pytest.mark.parametrize("name", PROBLEMS)
def test_dense_segmentations_have_the_score_of_their_table(name):
    p = with_gradients(PROBLEMS[name].to(torch.float64))
    scores, labels, durations = viterbi_labels(p)
    table = dense_to_table(labels, durations)
    best = viterbi(p)
    rows = zip(table.sequence.tolist(), table.start.tolist(), table.label.tolist(), strict=True)
    assert list(rows) == [
        (b, segment.start, segment.label)
        for b, segments in enumerate(best.segments)
        for segment in segments
    ]
    for found, wanted in zip(
        table_to_dense(table, *labels.shape), (labels, durations), strict=True
    ):
        assert torch.equal(found, wanted)
    assert torch.equal(durations.sum(1), p.lengths) and torch.equal(scores, best.scores)
    assert torch.equal((labels >= 0).sum(1), p.lengths)
    expected, actual = score_segments(p, table), score_dense(p, labels, durations)
    assert_close(actual, expected)
    values = list(p.parameters().values())
    for found, wanted in zip(
        torch.autograd.grad(actual.sum(), values),
        torch.autograd.grad(expected.sum(), values),
        strict=True,
    ):
        assert_close(found, wanted)


def test_a_forbidden_dense_segmentation_scores_minus_infinity():
    p = random_problem(ragged=False)
    labels = torch.zeros(p.scores.shape[:2], dtype=torch.int64)
    dense = table_to_dense(labels_to_table(labels, p.lengths, 1), *labels.shape)
    assert bool(score_dense(p, *dense).isfinite().all())
    forbidden = p.replace(final_scores=torch.full_like(p.transition[0], -1e38))
    assert score_dense(forbidden, *dense).tolist() == [-torch.inf] * len(labels)


def test_decode_labels_is_decode_with_traceback():
    model, (x, lengths, _) = Tagger(), batch()
    hidden = model.encoder(x)
    known = Constraints(boundaries=[[3], [], []])
    for options in ({}, {"constraints": known}, {"backend": "exact"}):
        scores, labels, durations = model.head.decode_labels(hidden, lengths, **options)
        expected = model.head.decode_with_traceback(hidden, lengths, **options)
        assert torch.equal(scores, expected.scores) and not scores.requires_grad
        found = dense_to_table(labels, durations)
        ends = [s.end + 1 for segments in expected.segments for s in segments]
        assert found.stop.tolist() == ends


# Export


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_decoder_runs_on_other_inputs_after_it_was_saved(strict):
    torch.manual_seed(0)
    model = Decoder(boundary_scores=True, initial_scores=True, duration_tail=-0.3, min_duration=2)
    x, lengths, _ = batch()
    sequences, positions = Dim("sequences"), Dim("positions")
    shapes = ({0: sequences, 1: positions}, {0: sequences})
    program = export(model.eval(), (x, lengths.clamp(min=2)), dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for seed, shape in enumerate([(3, 12), (2, 7), (5, 40)]):
        x, lengths, _ = batch(*shape, seed=seed)
        lengths = lengths.clamp(min=2)
        expected = model(x, lengths)
        for module in (program.module(), loaded.module()):
            scores, labels, durations = module(x, lengths)
            assert not scores.requires_grad
            assert_close(scores, expected[0], torch.float32)
            assert torch.equal(labels, expected[1]) and torch.equal(durations, expected[2])
    module = loaded.module()
    message = message_of(ValueError, module, x, torch.zeros_like(lengths))
    assert message == "`lengths` must be in [1, T=40]; got 0 at index 0."
    message = message_of(ValueError, module, torch.full_like(x, torch.nan), lengths)
    assert message.startswith("`hidden_states` must be finite")
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:.*gold segments are longer")
def test_an_exported_loss():
    model, given = Tagger(), batch()
    module = export(model, given).module()
    for seed in (0, 1):
        given = batch(seed=seed)
        assert_close(module(*given), model(*given), torch.float32)


class Call(nn.Module):
    """A function of hidden states and lengths as a module."""

    def __init__(self, function):
        super().__init__()
        self.head, self.function = SemiMarkovCRFHead(C, K, D), function

    def forward(self, x: Tensor, lengths: Tensor) -> object:
        return self.function(self.head, x, lengths)


LABELS = torch.arange(T).remainder(C).expand(B, T)
TABLE = labels_to_table(LABELS, torch.full((B,), T), K)
REFUSED = {
    "segments": lambda head, x, n: head.decode_with_traceback(x, n).scores,
    "marginals given facts": (
        lambda head, x, n: head.marginals(x, n, constraints=Constraints()).position
    ),
    "partial labels": lambda head, x, n: head.compute_loss(x, n, LABELS, ignore_index=-1),
    "a table": lambda head, x, n: head.compute_loss(x, n, TABLE),
    "constraints": lambda head, x, n: head.decode_labels(x, n, constraints=Constraints()),
    "edges": lambda head, x, n: head.decode_labels(x, n, backend="exact"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*gold segments are longer")
def test_export_of_the_rest_is_refused(name):
    x, lengths, _ = batch()
    message = message_of(RuntimeError, export, Call(REFUSED[name]), (x, lengths), strict=False)
    assert message.startswith("flash_semicrf cannot be traced or exported: ")
    assert "`decode_labels`" in message


def test_a_compiled_transform_is_refused():
    p = random_problem()

    def log_z(scores):
        return log_partition(p.replace(scores=scores)).sum()

    compiled = torch.compile(grad(log_z), backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not support the transforms of torch.func"):
        compiled(p.scores)
