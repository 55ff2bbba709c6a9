"""Parameters that an estimator takes beyond those it names, for the skorch net it builds."""

from __future__ import annotations

from typing import Any

__all__ = ["RoutedParamsMixin"]

_PREFIXES = (
    "module__",
    "optimizer__",
    "iterator_train__",
    "iterator_valid__",
    "callbacks__",
)


class RoutedParamsMixin:
    """``get_params`` and ``set_params`` that know the parameters routed to skorch."""

    def _extra_params(self) -> dict[str, Any]:
        """Parameters that the constructor took beyond those it names."""
        named = self._get_param_names()
        return {
            name: value
            for name, value in vars(self).items()
            if name not in named and not name.startswith("_") and not name.endswith("_")
        }

    def _check_extra_params(self) -> None:
        # Here rather than in the constructor, which by scikit-learn's rules only stores.
        for name in self._extra_params():
            if not name.startswith(_PREFIXES):
                raise TypeError(
                    f"{type(self).__name__} has no parameter {name!r}; further parameters start "
                    f"with one of {', '.join(_PREFIXES)}."
                )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters of the constructor, with those routed to skorch."""
        return {**super().get_params(deep=deep), **self._extra_params()}

    def set_params(self, **params: Any) -> Any:
        """Set parameters of the constructor and those routed to skorch."""
        routed = [name for name in params if name.startswith(_PREFIXES)]
        for name in routed:
            setattr(self, name, params.pop(name))
        return super().set_params(**params)
