"""`use_triton`, by name or where release 0.2.0 had it among the positional arguments."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import UncertaintySemiMarkovCRFHead
from flash_semicrf.compat.use_triton import backend_of
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import message_of

SCORES, LENGTHS = torch.randn(2, 9, 3), torch.tensor([9, 6])
LABELS = torch.arange(9).div(2, rounding_mode="floor").remainder(3).expand(2, 9)

# Arguments before `use_triton`, and after it, in the documents of release 0.2.0.
CALLS = {
    "forward": ((SCORES, LENGTHS), ("reference",)),
    "compute_loss": ((SCORES, LENGTHS, LABELS), ("reference", "sum")),
    "decode": ((SCORES, LENGTHS), ("reference",)),
    "decode_with_traceback": ((SCORES, LENGTHS, 10), ()),
    "marginals": ((SCORES, LENGTHS), ("reference",)),
    "compute_boundary_marginals": ((SCORES, LENGTHS, "reference", False), ()),
    "compute_position_marginals": ((SCORES, LENGTHS, "reference"), ()),
    "compute_entropy_streaming": ((SCORES, LENGTHS, "reference"), ()),
    "compute_entropy_exact": ((SCORES, LENGTHS, "reference"), ()),
    "compute_loss_uncertainty_weighted": (
        (SCORES, LENGTHS, LABELS, 1.0, "high_uncertainty"),
        ("sum", "reference"),
    ),
}


def tensors(result) -> list[torch.Tensor]:
    """The tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("use_triton", [True, False])
def test_use_triton_by_place_and_by_name(name, use_triton):
    torch.manual_seed(0)
    method = getattr(UncertaintySemiMarkovCRFHead(3, 4), name)
    before, after = CALLS[name]
    with record_backends() as plain:
        expected = tensors(method(*before, *after))
    with record_backends() as by_place:
        found = tensors(method(*before, use_triton, *after))
    with record_backends() as by_name:
        named = tensors(method(*before, *after, use_triton=use_triton))
    assert plain == by_place == by_name and len(expected) > 0
    for one, other, third in zip(expected, found, named, strict=True):
        assert_close(one, other)
        assert_close(one, third)
    assert (
        message_of(TypeError, method, *before, use_triton, *after, use_triton=True)
        == f"{name}() got `use_triton` twice."
    )


def test_what_use_triton_stands_for():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend_of(True, "auto", gpu) == backend_of(False, "auto", cpu) == "auto"
    assert backend_of(False, "auto", gpu) == backend_of(False, "streaming", gpu) == "reference"
    assert backend_of(False, "exact", gpu) == "exact"
    assert message_of(ValueError, backend_of, False, "triton", gpu) == (
        "`backend`='triton' contradicts `use_triton`=False."
    )
