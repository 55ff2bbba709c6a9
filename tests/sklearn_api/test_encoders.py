"""Encoders: shapes, padding invariance, modules of the user's, standardisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flash_semicrf.testing import assert_close
from sklearn_api.encoders import ENCODERS, CNNEncoder, Standardize, make_encoder

SETTINGS = {"hidden_size": 8, "num_layers": 2, "kernel_size": 3, "dropout": 0.0}


class TwoArguments(nn.Module):
    def __init__(self, in_features, width=4):
        super().__init__()
        self.linear = nn.Linear(in_features, width)

    def forward(self, x, lengths):
        return self.linear(x) * (lengths[:, None, None] > 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_make_encoder_shapes(name):
    module, out_features = make_encoder(name, 3, SETTINGS)
    hidden = module(torch.randn(2, 7, 3), torch.tensor([7, 4]))
    assert hidden.shape == (2, 7, out_features)
    assert out_features == (3 if name == "linear" else 8)


@pytest.mark.parametrize(
    ("name", "params"), [(name, {}) for name in ENCODERS] + [("cnn", {"stride": 4})]
)
def test_make_encoder_padding_and_batching_change_nothing(name, params):
    torch.manual_seed(0)
    module = make_encoder(name, 3, SETTINGS, params)[0].double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    together = module(x, torch.tensor([9, 5]))
    poisoned = x.clone()
    poisoned[1, 5:] = 1e6
    assert_close(module(poisoned, torch.tensor([9, 5]))[1, :5], together[1, :5])
    assert_close(module(x[1:, :5], torch.tensor([5]))[0], together[1, :5])


@pytest.mark.parametrize("num_positions", [1, 3, 4, 9])
def test_cnn_encoder_with_stride_keeps_positions(num_positions):
    module = CNNEncoder(2, 8, num_layers=2, stride=4)
    x = torch.randn(1, num_positions, 2)
    assert module(x, torch.tensor([num_positions])).shape == (1, num_positions, 8)
    with pytest.raises(ValueError, match="`stride` must be an integer >= 1; got 0"):
        CNNEncoder(2, 8, stride=0)


@pytest.mark.parametrize("name", ["cnn", "gru", "mlp"])
def test_make_encoder_reaches_its_neighbours(name):
    module = make_encoder(name, 1, SETTINGS)[0]
    x = torch.zeros(1, 21, 1, requires_grad=True)
    module(x, torch.tensor([21]))[0, 10, 0].backward()
    touched = int((x.grad.abs() > 0).sum())
    # The cnn's receptive field is 1 + (kernel_size - 1) * 2**num_layers.
    assert touched == {"mlp": 1, "cnn": 9, "gru": 21}[name]


def test_make_encoder_user_modules():
    settings = dict(SETTINGS)
    module, width = make_encoder(TwoArguments, 3, settings, {"width": 5})
    assert width == 5
    given = nn.Linear(3, 6)
    module, width = make_encoder(given, 3, settings)
    assert width == 6
    assert module(torch.zeros(1, 2, 3), torch.tensor([2])).shape == (1, 2, 6)
    with torch.no_grad():
        next(module.parameters()).fill_(7.0)
    assert not bool((given.weight == 7.0).any())


def test_make_encoder_bad_modules():
    with pytest.raises(ValueError, match="`encoder` must map .* it gave tuple"):
        make_encoder(nn.GRU(3, 4, batch_first=True), 3, SETTINGS)
    with pytest.raises(ValueError, match="`module__width` needs an encoder given by name"):
        make_encoder(nn.Linear(3, 4), 3, SETTINGS, {"width": 1})
    with pytest.raises(ValueError, match="`kernel_size` must be odd; got 4"):
        make_encoder("cnn", 3, {**SETTINGS, "kernel_size": 4})
    with pytest.raises(ValueError, match="`hidden_size` must be even .* got 7"):
        make_encoder("gru", 3, {**SETTINGS, "hidden_size": 7})


def test_standardize_from_positions():
    rng = np.random.default_rng(0)
    values = [rng.normal(5.0, 2.0, size=(n, 2)) for n in (10, 30)]
    for value in values:
        value[:, 1] = 3.0  # a constant feature is centred only
    module = Standardize.from_positions(values)
    scaled = module(torch.from_numpy(np.concatenate(values)))
    assert_close(scaled.mean(0), torch.zeros(2, dtype=torch.float64))
    assert_close(scaled[:, 0].std(correction=0), torch.tensor(1.0, dtype=torch.float64))
