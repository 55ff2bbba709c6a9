"""Where things live: public names, and which parts of the packages may import which."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import flash_semicrf
import flash_semicrf.compat
import flash_semicrf.nn
import sklearn_api
from benchmarks.house import long_signatures

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a module may import its own layer and those before it. Within `streaming`,
# backends import their packages of kernels, and not the other way round.
LAYERS = [
    ["flash_semicrf._version", "flash_semicrf.forking", "flash_semicrf.problem.arguments"],
    ["flash_semicrf.problem"],
    ["flash_semicrf.duration", "flash_semicrf.semirings", "flash_semicrf.testing"],
    ["flash_semicrf.sparse"],
    [
        "flash_semicrf.streaming.assembly",
        "flash_semicrf.streaming.compilation",
        "flash_semicrf.streaming.pieces.plan",
        "flash_semicrf.streaming.streams",
        "flash_semicrf.streaming.tilt",
        "flash_semicrf.streaming.windows",
    ],
    [
        "flash_semicrf.streaming.reference",
        "flash_semicrf.streaming.reference_nbest",
        "flash_semicrf.streaming.cpu",
        "flash_semicrf.streaming.triton",
    ],
    ["flash_semicrf.streaming"],
    ["flash_semicrf.inference"],
    ["flash_semicrf.compat"],
    ["flash_semicrf.exact"],
    ["flash_semicrf.nn"],
    ["flash_semicrf"],
    ["sklearn_api.encoders", "sklearn_api._sklearn"],
    ["sklearn_api._inputs", "sklearn_api._parameters", "sklearn_api._responses"],
    ["sklearn_api._model"],
    ["sklearn_api._training"],
    ["sklearn_api._lbfgs"],
    ["sklearn_api._prediction", "sklearn_api._posterior", "sklearn_api._persistence"],
    ["sklearn_api.segmenter", "sklearn_api.preprocessing"],
    ["sklearn_api.metrics", "sklearn_api.datasets"],
    ["sklearn_api.model_selection", "sklearn_api.display"],
    ["sklearn_api"],
]

# By types alone, for annotations: see the module.
FOR_TYPES = {("flash_semicrf.problem.constraint_masks", "flash_semicrf.problem.constraints")}

# Functions of more than ten arguments: constructors whose options users name, a call form of
# release 0.2.0, and random problems.
LONG = {
    "flash_semicrf.compat.cumulative.semi_crf_streaming_forward",
    "flash_semicrf.nn.head.__init__",
    "flash_semicrf.testing.random_problem",
    "sklearn_api.segmenter.__init__",
}


def modules() -> dict[str, Path]:
    """Every module of both packages, by name."""
    found = {}
    for package in ("flash_semicrf", "sklearn_api"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> list[tuple[str, str]]:
    """(module, name) of everything that a module imports from these packages."""
    found = []
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "flash_semicrf",
            "sklearn_api",
        ):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in MODULES else (node.module, alias.name))
    return found


def layer(name: str) -> int:
    """Index of the longest entry of `LAYERS` that a module is, or is below."""
    places = [
        (len(entry), i)
        for i, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    return max(places)[1]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upwards(name):
    upwards = {
        found
        for found, _ in imports(name)
        if layer(found) > layer(name) and (name, found) not in FOR_TYPES
    }
    assert not upwards


def test_no_circles():
    graph = {name: {found for found, _ in imports(name)} for name in MODULES}
    for name, found in FOR_TYPES:
        graph[name].discard(found)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"{' -> '.join(path)} -> {name}"
        if name not in done:
            for found in graph[name]:
                visit(found, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_few_arguments():
    """At most ten, outside Triton and `LONG`; longer lists are records."""
    assert {f"{name}.{function}" for name, function, _ in long_signatures(MODULES)} == LONG


def test_no_code_escapes_the_formatter():
    assert not [name for name, path in MODULES.items() if "# fmt:" in path.read_text("utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_no_underscored_name_is_taken_from_another_module(name):
    taken = [(m, n) for m, n in imports(name) if n.startswith("_") and n != "__version__"]
    assert not taken


def test_documents_need_no_private_path():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        private = re.findall(r"(?:from|import) (?:flash_semicrf|sklearn_api)[\w.]*\._\w+", text)
        assert not private, page


def test_public_names_of_flash_semicrf():
    assert flash_semicrf.__all__ == [
        "BandedMatrix",
        "BlockTriangularMatrix",
        "CallableDuration",
        "Constraints",
        "GeometricDuration",
        "LearnedDuration",
        "NBestResult",
        "NegativeBinomialDuration",
        "PoissonDuration",
        "Potentials",
        "Segment",
        "SegmentMarginals",
        "SegmentTable",
        "Segments",
        "SemiCRFDistribution",
        "SemiMarkov",
        "SemiMarkovCRFHead",
        "UncertaintySemiMarkovCRFHead",
        "UniformDuration",
        "ViterbiResult",
        "__version__",
        "apply_permutation",
        "block_triang_matmul",
        "consensus",
        "create_duration_distribution",
        "cross_entropy",
        "entropy",
        "kl_divergence",
        "log_partition",
        "measure_effective_bandwidth",
        "minimum_risk",
        "n_best",
        "position_entropy",
        "rcm_ordering_from_adjacency",
        "sample",
        "segment_marginals",
        "segment_probabilities",
        "semi_crf_streaming_forward",
        "snake_ordering",
        "viterbi",
        "viterbi_labels",
    ]
    assert all(hasattr(flash_semicrf, name) for name in flash_semicrf.__all__)


def test_public_names_of_the_heads_and_of_release_0_2_0():
    assert flash_semicrf.nn.__all__ == ["SemiMarkovCRFHead", "UncertaintySemiMarkovCRFHead"]
    assert flash_semicrf.compat.__all__ == [
        "HAS_TRITON",
        "NEG_INF",
        "SemiCRFStreaming",
        "SemiCRFStreamingTriton",
        "compute_edge_block_streaming",
        "launch_streaming_triton_backward",
        "launch_streaming_triton_kernel",
        "launch_streaming_triton_kernel_max_bp",
        "semi_crf_streaming_forward",
        "semi_crf_streaming_viterbi_triton",
        "semi_crf_streaming_viterbi_with_backpointers",
    ]
    for name in flash_semicrf.compat.__all__:
        # The path by which release 0.2.0 documented them.
        assert getattr(flash_semicrf.streaming, name) is getattr(flash_semicrf.compat, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        flash_semicrf.streaming.no_such_name  # noqa: B018


def test_public_names_of_sklearn_api():
    assert sklearn_api.__all__ == [
        "InconsistentVersionWarning",
        "SemiCRFSegmenter",
        "StopTraining",
        "as_sequences",
        "get_response",
    ]
