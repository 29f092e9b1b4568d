"""Checks of settings, which come from a command line or a JSON file as strings, lists and dicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from math import isfinite
from operator import index
from reprlib import repr as shown
from typing import Any

from .errors import unknown

__all__ = ["check_name", "finite", "is_count", "items", "number", "shown", "whole"]


def check_name(kind: str, value: object, known: Collection[str]) -> None:
    """RerouteError unless ``value`` is one of the names ``known``."""
    if not isinstance(value, str) or value not in known:
        raise unknown(kind, value, known)


def number(value: Any) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is none, or only reads like one.
        OverflowError: no float is as large.
    """
    if isinstance(value, (bool, str, bytes, bytearray)):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def finite(value: Any) -> int | float:
    """``value`` as a number that is neither infinite nor NaN; a whole one stays an int. Raises as ``number`` does.

    Raises:
        ValueError: it is infinite or NaN.
    """
    try:
        return whole(value)
    except TypeError:
        share = number(value)
    if not isfinite(share):
        raise ValueError(f"{share} is not finite")
    return share


def whole(value: Any) -> int:
    """``value`` as an int. TypeError if it is no whole number, or only reads like one."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return index(value)


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number of at least 1."""
    try:
        return whole(value) >= 1
    except TypeError:
        return False


def items(values: Any) -> list[Any]:
    """What is in a sequence. TypeError for what is none, or has no order, or is a text."""
    if isinstance(values, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError(f"{shown(values)} is no sequence")
    return list(values)
