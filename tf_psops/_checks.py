"""Checks of the arguments that users give."""

import numbers
from typing import Any


def check(good: bool, expected: str, **argument: Any) -> None:
    """Raises a `ValueError` that names the argument and its value, unless good.

    Args:
        good: Whether the argument's value is good.
        expected: What a good value would be.
        **argument: The one argument, as name=value.
    """
    if not good:
        [(name, value)] = argument.items()
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected {expected}. Received: "
            f"{name}={value!r}."
        )


def is_real(value: Any) -> bool:
    """Returns whether a value is a real number, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
