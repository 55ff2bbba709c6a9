"""Interface of the semirings of the exact engine.

A semiring has a sum, a product that distributes over it, and their neutral elements ``zero`` and
``one``. An algorithm written in these terms computes log Z, the best score, the entropy and more,
depending on the semiring.

Values are tensors with one leading axis of `size` components: (size, ...). ``convert`` turns
potentials into values and ``unconvert`` values into results. Methods can be called on a class that
needs no arguments, as in torch-struct: ``LogSemiring.sum(x)``.

References
----------
J. Goodman, Semiring Parsing, Computational Linguistics 1999.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = ["EdgeGradient", "Element", "Result", "Semiring", "as_semiring", "components"]

Element: TypeAlias = float | tuple[float, ...]
"""A neutral element: a number, or a tuple of `size` numbers."""

EdgeGradient: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Derivative of a total by the edges; see the attribute of `Semiring`."""

Result = TypeVar("Result")
Class = TypeVar("Class", bound=type)


def components(element: Element) -> tuple[float, ...]:
    """Components of a neutral element as a tuple."""
    return element if isinstance(element, tuple) else (element,)


class _Method:
    """Method that can also be called on the class, with a new instance without arguments."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]  # bound first, then called

    def __get__(self, instance: Semiring | None, owner: type[Semiring]) -> MethodType:
        return MethodType(self._function, owner() if instance is None else instance)


def _callable_on_class(cls: Class) -> Class:
    for name, value in list(vars(cls).items()):
        if inspect.isfunction(value) and not name.startswith("_"):
            setattr(cls, name, _Method(value))
    return cls


@_callable_on_class
class Semiring:
    """Base class of semirings; a subclass defines ``zero``, ``one``, ``sum`` and ``mul``.

    Attributes
    ----------
    size : int
        Number of components of a value.
    zero, one : float, or tuple of `size` floats
        Neutral elements of the sum and of the product; zero times anything is zero.
    num_potentials : int
        Number of edge tensors that ``convert`` takes: 1, or 2 to compare two distributions.
    log_domain : bool
        Whether potentials are logarithms, of which -inf forbids.
    edge_gradient : callable or None
        ``edge_gradient(before, edges, after, total)``, if defined, is the derivative of the sum
        over all paths with respect to each edge, given the sums over the path segments before and
        after it. All arguments are values that broadcast to those of the edges; the result has no
        leading axis. Only for a semiring of size 1.

    Notes
    -----
    All methods must be differentiable by autograd. A gradient must not be NaN where a value is
    zero: the backward pass must not compute ``0 * inf``.
    """

    size: int = 1
    zero: Element
    one: Element
    num_potentials: int = 1
    log_domain: bool = True
    edge_gradient: EdgeGradient | None = None

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        _callable_on_class(cls)

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Sum of values over one axis, counted from the end (so `dim` < 0)."""
        raise NotImplementedError

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Product of values, entry by entry; a and b broadcast."""
        raise NotImplementedError

    def convert(self, potentials: Tensor) -> Tensor:
        """Values of potentials: by default the potential, then the further components of `one`."""
        first = potentials[None]
        if self.size == 1:
            return first
        rest = self.full(self.one, potentials.shape, potentials)[1:]
        return torch.cat([first, rest])

    def unconvert(self, values: Tensor) -> Tensor:
        """Result held by values: by default their first component."""
        return values[0]

    # Defaults in terms of the above

    def full(self, element: Element, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """View of shape (size, *shape) that holds `zero` or `one` everywhere."""
        column = torch.tensor(element, dtype=like.dtype, device=like.device)
        return column.view(self.size, *(1,) * len(shape)).expand(self.size, *shape)

    def plus(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two values, entry by entry."""
        return self.sum(torch.stack([a, b], -1), -1)

    def times(self, *values: Tensor) -> Tensor:
        """Product of any number of values, entry by entry."""
        product = values[0]
        for value in values[1:]:
            product = self.mul(product, value)
        return product

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over the last axis of the products."""
        return self.sum(self.mul(a, b), -1)

    def prod(self, x: Tensor, dim: int = -1) -> Tensor:
        """Product over one axis, counted from the end, in pairs."""
        x = x.movedim(dim, -1)
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            paired = self.mul(x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
            x = torch.cat([paired, x[..., 2 * half :]], -1)
        return x[..., 0] if x.shape[-1] else self.full(self.one, tuple(x.shape[1:-1]), x)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product of values, (size, ..., I, J) by (size, ..., J, L)."""
        return self.sum(self.mul(a[..., :, :, None], b[..., None, :, :]), -2)

    def matmul_terms(self, count: int, rows: int, inner: int, columns: int) -> int:
        """Numbers held at once by a `matmul` of `count` matrices, to estimate memory."""
        return self.size * count * rows * inner * columns

    def run(self, function: Callable[..., Result], *tensors: Tensor) -> Result:
        """Call a part of an algorithm; checkpointing semirings recompute its results."""
        return function(*tensors)


def as_semiring(semiring: Semiring | type[Semiring]) -> Semiring:
    """Semiring given as an instance or as a class that needs no arguments.

    Raises
    ------
    TypeError
        If `semiring` is neither.
    """
    made = semiring() if isinstance(semiring, type) else semiring
    if not isinstance(made, Semiring):
        raise TypeError(f"`semiring` must be a Semiring or a subclass; got {semiring!r}.")
    return made
