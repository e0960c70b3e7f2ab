"""Numbers that users pass, checked: what is allowed stands in the error."""

from __future__ import annotations

import math
import numbers
import operator

import torch

from .errors import SettingError


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False, finite: bool = True) -> float:
    """The value as a float inside [low, high]; raises SettingError with the range otherwise. NumPy's and torch's scalars are numbers."""
    x = math.nan
    if isinstance(value, numbers.Real) or is_scalar_tensor(value):
        try:
            x = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    ok = low <= x <= high and not (math.isinf(x) and finite) and not (open_low and x == low)
    if not ok:
        bounds = f"{'(' if open_low or math.isinf(low) else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise SettingError(f"{name} must be a number in {bounds}, got {value!r}")
    return x


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int in low..high; raises SettingError with the range otherwise."""
    x = as_integer(value)
    if x is None or x < low or (high is not None and x > high):
        raise SettingError(f"{name} must be an integer {f'in {low}..{high}' if high is not None else f'>= {low}'}, got {value!r}")
    return x


def as_integer(value: object) -> int | None:
    """The value as an int if it is one (NumPy's and torch's integers too, bool not), else None."""
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and (value.dim() > 0 or value.dtype is torch.bool)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return None


def plain(value: object) -> object:
    """NumPy's and torch's scalars as the int or float that JSON knows; anything else as it is."""
    x = as_integer(value)
    if x is not None or isinstance(value, (bool, float)):
        return value if x is None else x
    return float(value) if isinstance(value, numbers.Real) or is_scalar_tensor(value) else value  # type: ignore[arg-type]


def is_scalar_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype is not torch.bool and not value.is_complex()
