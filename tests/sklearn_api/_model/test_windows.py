"""Encoding by windows: the receptive field stated, and the same result as a whole run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.testing import assert_close
from sklearn_api import SemiCRFSegmenter
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.windows import Context, encode_in_windows, encoder_context
from sklearn_api.encoders import CNNEncoder, make_encoder
from tests.sklearn_api.comparisons import assert_same_segments

SETTINGS = {"hidden_size": 8, "num_layers": 2, "kernel_size": 3, "dropout": 0.0}


class Recorder(nn.Module):
    """Passes on to an encoder and keeps the lengths it is run on."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.receptive_field = getattr(encoder, "receptive_field", None)
        self.stride = getattr(encoder, "stride", 1)
        self.runs = []

    def forward(self, x, lengths):
        self.runs.append(x.shape[1])
        return self.encoder(x, lengths)


def module_of(name, params=None):
    torch.manual_seed(0)
    encoder, width = make_encoder(name, 3, SETTINGS, params)
    head = SemiMarkovCRFHead(2, 3, width)
    return SegmentationModule(Recorder(encoder), head).double().eval()


@pytest.mark.parametrize("params", [{}, {"stride": 2}, {"stride": 3, "kernel_size": 5}])
def test_cnn_receptive_field_is_what_gradients_reach(params):
    """Nothing outside it is reached from any position; without a stride all of it is."""
    torch.manual_seed(0)
    encoder = CNNEncoder(1, 4, **{"num_layers": 2, "kernel_size": 3, **params}).double()
    reach = encoder_context(encoder).reach
    num_positions = 4 * reach
    for target in range(2 * reach - 3, 2 * reach + 3):
        x = torch.randn(1, num_positions, 1, dtype=torch.float64, requires_grad=True)
        encoder(x, torch.tensor([num_positions]))[0, target].square().sum().backward()
        touched = x.grad[0, :, 0].nonzero()[:, 0] - target
        assert int(touched.abs().max()) <= reach
        if not params:
            assert len(touched) == encoder.receptive_field == 9


@pytest.mark.parametrize(
    ("name", "params"),
    [("linear", {}), ("mlp", {}), ("cnn", {}), ("cnn", {"stride": 4}), ("gru", {})],
)
@pytest.mark.parametrize("window", [1, 7, 16, 40, 1000])
def test_encode_in_windows_equals_the_whole_run(name, params, window):
    module = module_of(name, params)
    x = torch.randn(2, 53, 3, dtype=torch.float64)
    lengths = torch.tensor([53, 17])
    with torch.no_grad():
        hidden = encode_in_windows(module, x, lengths, window)
        runs, module.encoder.runs = module.encoder.runs, []
        whole = module(x, lengths)
    assert_close(hidden[0], whole[0])
    assert_close(hidden[1, :17], whole[1, :17])
    context = encoder_context(module.encoder)
    if name == "gru" or window >= 53:
        assert runs == [53]
    else:
        assert len(runs) == -(-53 // window)
        assert max(runs) <= window + 2 * (context.reach + context.stride)


def test_a_narrower_overlap_would_not_do():
    module = module_of("cnn")
    x = torch.randn(1, 53, 3, dtype=torch.float64)
    lengths = torch.tensor([53])
    module.encoder.receptive_field -= 2
    with torch.no_grad():
        assert not torch.allclose(encode_in_windows(module, x, lengths, 16), module(x, lengths))


def test_context_span():
    assert Context(5, 1).span(20, 30, 100) == (15, 35)
    assert Context(5, 4).span(20, 30, 100) == (12, 36)
    assert Context(5, 4).span(2, 98, 99) == (0, 99)


def test_encoder_context_bad_receptive_field():
    encoder = nn.Linear(1, 1)
    assert encoder_context(encoder) is None
    encoder.receptive_field = 4
    with pytest.raises(ValueError, match="must be an odd integer >= 1 or None; got 4"):
        encoder_context(encoder)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_segments"])
def test_predictions_of_a_segmenter_do_not_depend_on_windows(method):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(40) % 2, rng.integers(3, 9, 40))
    X = y[:, None] + 0.1 * rng.normal(size=(len(y), 2))
    # Neighbours of one label would tie in either order: they are forbidden.
    segmenter = SemiCRFSegmenter(
        "cnn", hidden_size=8, num_layers=2, max_epochs=20, learning_rate=0.05, dtype="float64",
        transition_constraints="observed", random_state=0,
    ).fit(X, y)  # fmt: skip
    best, second = segmenter.predict_topk(X, 2)
    assert sum(s.score for s in best) - sum(s.score for s in second) > 0.1
    whole = getattr(segmenter, method)(X)
    windowed = getattr(segmenter.set_params(window_length=30), method)(X)
    if method == "predict_segments":
        assert_same_segments(whole, windowed)
    elif method == "predict":
        np.testing.assert_array_equal(whole, windowed)
    else:
        np.testing.assert_allclose(whole, windowed, atol=1e-9)
