"""Files that a call enters: ``python benchmarks/children/entered.py CALL ROOT``.

Runs CALL twice with the packages under ROOT, which must come first on the path, and prints the
files of these packages whose Python functions the second call entered, each with the file of its
first caller, as JSON. In the second call nothing is imported or compiled. Functions that numba has
compiled do not appear.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


def estimator_call(name: str) -> Callable[[], Any]:
    """`fit` of a new segmenter with mini-batches, or `predict` of a fitted one, on a CPU."""
    from sklearn_api import SemiCRFSegmenter
    from sklearn_api.datasets import make_segmentations

    X, y = make_segmentations(8, (30, 60), random_state=0)

    def fit() -> SemiCRFSegmenter:
        segmenter = SemiCRFSegmenter("cnn", max_epochs=2, batch_size=4, device="cpu")
        return segmenter.fit(X, y)

    if name == "fit":
        return fit
    fitted = fit()
    return lambda: fitted.predict(X)


def log_partition_call() -> Callable[[], Any]:
    """`log_partition` of a small batch, without a gradient, on a CPU."""
    import torch

    from flash_semicrf import Potentials

    try:
        from flash_semicrf import log_partition
    except ImportError:  # trees in which the verbs are not at the top
        from flash_semicrf.streaming import log_partition
    potentials = Potentials(
        scores=torch.zeros(2, 400, 4),
        transition=torch.zeros(4, 4),
        duration_bias=torch.zeros(100, 4),
        lengths=torch.tensor([400, 300]),
    )
    return lambda: log_partition(potentials)


def main(argv: list[str]) -> None:
    """Profile the second run of a call."""
    name, root = argv[0], Path(argv[1]).resolve()
    call = log_partition_call() if name == "log_partition" else estimator_call(name)
    call()
    packages = tuple(f"{root}/{package}/" for package in ("flash_semicrf", "sklearn_api"))
    callers: dict[str, str] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event != "call" or file in callers or not file.startswith(packages):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(packages):
            caller = caller.f_back
        callers[file] = "" if caller is None else caller.f_code.co_filename

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    start = len(f"{root}/")
    print(json.dumps({file[start:]: caller[start:] for file, caller in callers.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
