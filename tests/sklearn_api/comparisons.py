"""Results that come by different paths: the same decisions, and numbers equal but for rounding."""

from __future__ import annotations

import numpy as np


def assert_same_segments(found, expected, atol=1e-9):
    """The same segments of one sequence, whose scores may differ by rounding."""
    rows, wanted = ([(s.start, s.end, s.label) for s in one] for one in (found, expected))
    assert rows == wanted
    np.testing.assert_allclose([s.score for s in found], [s.score for s in expected], atol=atol)
