"""The argument `use_triton` of release 0.2.0, as a choice of `backend`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["accepts_use_triton", "backend_of"]

Method = TypeVar("Method", bound=Callable[..., Any])


def backend_of(use_triton: bool, backend: str, device: torch.device) -> str:
    """Backend selected by ``use_triton`` and ``backend`` together.

    Parameters
    ----------
    use_triton : bool
        False runs the reference loop in place of Triton kernels, for tensors on a GPU.
    backend : str
    device : torch.device
        Of the problem.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If the two contradict each other.
    """
    if use_triton:
        return backend
    if backend == "triton":
        raise ValueError("`backend`='triton' contradicts `use_triton`=False.")
    free = backend in ("auto", "streaming")
    return "reference" if free and device.type == "cuda" else backend


def accepts_use_triton(position: int) -> Callable[[Method], Method]:
    """Decorator that adds the argument `use_triton` of release 0.2.0 to a method with `backend`.

    Parameters
    ----------
    position : int
        Index of `use_triton` among the positional arguments after `self`: a bool there is taken as
        its value.

    Returns
    -------
    callable
        A decorator of methods whose first argument is a Tensor. The decorated method raises
        TypeError if `use_triton` is given twice, and errors as `backend_of`.
    """

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def accepting(self: Any, *args: Any, **kwargs: Any) -> Any:
            by_position = len(args) > position and isinstance(args[position], bool)
            if not by_position and "use_triton" not in kwargs:
                return method(self, *args, **kwargs)
            if by_position and "use_triton" in kwargs:
                raise TypeError(f"{method.__name__}() got `use_triton` twice.")
            if by_position:
                use_triton = args[position]
                args = (*args[:position], *args[position + 1 :])
            else:
                use_triton = kwargs.pop("use_triton")
            given = signature.bind(self, *args, **kwargs).arguments
            device = getattr(next(iter([*given.values()][1:])), "device", torch.device("cpu"))
            chosen = backend_of(use_triton, given.get("backend", "auto"), device)
            return method(**{**given, "backend": chosen})

        return cast(Method, accepting)  # `use_triton` stays out of the signature

    return decorate
