"""Tasks of a kernel, handed to its threads one after the other.

Every thread runs the same kernel, which takes a task whenever it is done with one, so that a thread
on a busy core does fewer of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from flash_semicrf.streaming.cpu.parts import helper

__all__ = ["Queue", "fetch_add", "take"]


class Queue(NamedTuple):
    """The tasks, as the threads of a kernel see them.

    Attributes
    ----------
    next : int64 array of shape (1,)
        Index of the first task that no thread has taken; shared by the threads.
    tasks : int64 array of shape (N,)
    """

    next: np.ndarray
    tasks: np.ndarray


@intrinsic
def fetch_add(typing_context, array, amount):
    """Add to the first element of an int64 array, atomically; return what it was before."""

    def generate(context, builder, signature, values):
        counter = context.make_array(signature.args[0])(context, builder, values[0])
        return builder.atomic_rmw("add", counter.data, values[1], "monotonic")

    return types.int64(array, types.int64), generate


@helper
def take(queue):
    """Next task of a `Queue`; -1 when there is none left."""
    i = fetch_add(queue.next, 1)
    if i >= queue.tasks.shape[0]:
        return -1
    return queue.tasks[i]
