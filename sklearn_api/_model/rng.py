"""Random numbers that leave the global state alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PrivateRNG"]


class PrivateRNG:
    """A torch random state of one's own: the global one is put back after each use.

    Uses in several threads wait for each other, because there is one global state to borrow.

    Parameters
    ----------
    seed : int
    device : torch.device
    """

    _lock = threading.RLock()

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.states: tuple[Tensor, ...] | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Draw from the private state inside the block."""
        on_gpu = self.device.type == "cuda"
        with self._lock, torch.random.fork_rng([self.device] if on_gpu else []):
            if self.states is None:
                torch.manual_seed(self.seed)
            else:
                torch.set_rng_state(self.states[0])
                if on_gpu and len(self.states) > 1:
                    torch.cuda.set_rng_state(self.states[1], self.device)
            try:
                yield
            finally:
                states = [torch.get_rng_state()]
                if on_gpu:
                    states.append(torch.cuda.get_rng_state(self.device))
                self.states = tuple(states)
