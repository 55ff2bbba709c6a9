"""The form that callers of `launch` give says all that the compiler depends on."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch

from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.streaming.triton.backend import HAS_TRITON
from flash_semicrf.testing import random_problem

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

TRITON = BACKENDS["triton"]

OPTIONS = {
    "boundary": ("start_scores", "end_scores"),
    "start": ("start_scores",),
    "ends": ("initial_scores", "final_scores"),
    "tail": ("duration_tail",),
    "nothing": (),
}


def problems():
    """Problems of every choice of optional parameters and dtypes, one and two sequences."""
    dtypes = (torch.float32, torch.float64)
    for names, wide, batch in itertools.product(OPTIONS.values(), range(4), (1, 2)):
        whole = random_problem(
            batch, 70, 9, 3, boundary=True, ends=True, tail=True, dtype=torch.float64
        )
        optional = set().union(*OPTIONS.values()) - set(names)
        p = whole.replace(**dict.fromkeys(optional)).to(dtypes[wide % 2])
        yield p.replace(transition=p.transition.to(dtypes[wide // 2]))


@pytest.fixture(scope="module")
def launches():
    """By kernel, form, warps and constants, the signatures of the launches of all problems."""
    from flash_semicrf.streaming.triton import scaling, table, values
    from flash_semicrf.streaming.triton.jit import signature_of
    from flash_semicrf.streaming.triton.static import chunks, decoding, gradient, launch

    found = defaultdict(set)

    def record(kernel, grid, *arguments, num_warps, form=None, **constants):
        if form is not None:
            signature, given = signature_of(kernel, arguments, constants)
            key = (kernel.fn.__name__, form, num_warps, *constants.items())
            nones = [key for key, value in given.items() if value is None]
            found[key].add((str(signature), str(nones)))

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (chunks, decoding, gradient, launch, scaling, table, values):
            monkeypatch.setattr(module, "launch", record)
        for p in problems():
            values.flags_of(p)
            TRITON.log_partition(p)
            with monkeypatch.context() as nothing_found:
                nothing_found.setattr(torch, "empty", torch.zeros)  # numbers of segments are read
                TRITON.viterbi(p)
            given = p.parameters()
            for wanted in (set(given), {"scores"}, {"transition", "duration_bias"}):
                for few in (1, 64):
                    monkeypatch.setattr(chunks, "FEW", few)
                    log_z, gradients = TRITON.gradients(p, wanted)
                for dtype, bad in itertools.product((None, torch.float32), (None, log_z > 0)):
                    dtypes = {name: dtype or given[name].dtype for name in wanted}
                    TRITON.scaled(gradients, log_z, bad, dtypes)
    return found


def test_form_and_constants_say_what_is_compiled(launches):
    assert not {key: found for key, found in launches.items() if len(found) > 1}


def test_kernels_of_usual_calls_have_a_form(launches):
    assert {key[0] for key in launches} == {
        "boundary_kernel",
        "carry_kernel",
        "duration_gradient_kernel",
        "finish_kernel",
        "flags_kernel",
        "last_segment_kernel",
        "max_pass_kernel",
        "pass_kernel",
        "prepare_kernel",
        "previous_segment_kernel",
        "scale_kernel",
        "traceback_kernel",
    }
