"""Keep a core busy while the process lives that asked for it.

Run as ``python -m benchmarks.children.spin PARENT``; an empty line says that it has begun.
"""

from __future__ import annotations

import os
import sys


def main(argv: list[str]) -> None:
    """Spin on the last core that this process may use, where the system lets it choose."""
    parent = int(argv[0])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(flush=True)
    while os.getppid() == parent:
        for _ in range(100_000):
            pass


if __name__ == "__main__":
    main(sys.argv[1:])
