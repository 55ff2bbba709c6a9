"""Time the first call of a fresh process: ``python -m benchmarks.children.first_call OUT.json``.

`NUMBA_CACHE_DIR` in the environment decides whether compiled kernels are found there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    """Time the imports, then log Z + gradient of a small problem."""
    begin = time.perf_counter()
    import torch

    from flash_semicrf import log_partition
    from flash_semicrf.problem.potentials import Potentials

    imported = time.perf_counter()
    B, T, K, C = 2, 50, 10, 4
    potentials = Potentials(
        scores=torch.zeros(B, T, C, requires_grad=True),
        transition=torch.zeros(C, C, requires_grad=True),
        duration_bias=torch.zeros(K, C, requires_grad=True),
        lengths=torch.full((B,), T),
    )
    ready = time.perf_counter()
    log_partition(potentials).sum().backward()
    seconds = time.perf_counter() - ready
    record = {"import_s": imported - begin, "median_s": seconds, "status": "ok"}
    Path(argv[0]).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
