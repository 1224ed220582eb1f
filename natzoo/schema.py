"""Rules for values in files of others: checked once, before anything is built from them."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# Limits on plain data. Nested data that refers to itself, or to the same part many times, is small in a file but
# endless for code that visits all of it.
_MAX_DEPTH = 32
_MAX_PARTS = 1_000_000
_MAX_INT = 2**64
_SHOWN, _SHOWN_ITEMS = 200, 8  # characters and items of a value in a message


class Rule(NamedTuple):
    """A condition on a value.

    Attributes:
        expected: completes "it must be ...".
        holds: tests a value of any type, without raising.
    """

    expected: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """Accept integers in a range, but no booleans."""
    return Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """Accept integers and floats in a range, but no booleans and no NaN; infinity only if it is a limit."""
    bounds = "" if low == -math.inf and high == math.inf else f" from {low:g} to {high:g}"
    return Rule(f"a number{bounds}", lambda value: type(value) in (int, float) and low <= value <= high)


def text(longest: int = 1000) -> Rule:
    """Accept strings of a limited length."""
    return Rule(f"a string of at most {longest} characters", lambda value: type(value) is str and len(value) <= longest)


def one_of(*values: Any) -> Rule:
    """Accept the given values."""
    expected = f"one of {', '.join(map(str, values))}"
    return Rule(expected, lambda value: any(type(value) is type(known) and value == known for known in values))


def sequence(item: Rule, shortest: int = 0, longest: int = 1_000_000) -> Rule:
    """Accept lists and tuples of a limited length whose items follow a rule."""
    length = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    return Rule(
        f"a list of {length} values, each {item.expected}",
        lambda value: (
            isinstance(value, (list, tuple)) and shortest <= len(value) <= longest and all(map(item.holds, value))
        ),
    )


def mapping() -> Rule:
    """Accept dictionaries with strings as keys."""
    return Rule(
        "a dictionary with strings as keys",
        lambda value: isinstance(value, dict) and all(type(key) is str for key in dict.keys(value)),
    )


def optional(rule: Rule) -> Rule:
    """Accept None too."""
    return Rule(f"None or {rule.expected}", lambda value: value is None or rule.holds(value))


def check_values(source: str, values: Any, rules: Mapping[str, Rule], required: Collection[str] | None = None) -> None:
    """Check the entries of a dictionary. Entries without a rule are ignored.

    Args:
        source: file and part of it that the values come from, which begins the message.
        values: the dictionary, or anything that a file has in its place.
        rules: rules by key.
        required: keys that must be present; None for all.

    Raises:
        ValueError: if `values` is not a dictionary, lacks a key or breaks a rule.
    """
    if not mapping().holds(values):
        raise ValueError(f"{source} is {shown(values)}; it must be {mapping().expected}.")
    for key, rule in rules.items():
        if key not in values:
            if required is None or key in required:
                raise ValueError(f"{source} has no {key}; it must be {rule.expected}.")
        elif not rule.holds(values[key]):
            raise ValueError(f"{source} has {key} = {shown(values[key])}; it must be {rule.expected}.")


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; values that cannot be compared, such as tensors, are not."""
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):
        return False


def shown(value: Any) -> str:
    """Return a value for messages: shortened, on one line, and without characters that control a terminal."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)) and len(value) > _SHOWN_ITEMS:
        return f"{shown(list(value[:_SHOWN_ITEMS]))[:-1]}, ... ({len(value)} in total)"
    if isinstance(value, (dict, set)) and len(value) > _SHOWN_ITEMS:
        return f"a {type(value).__name__} of {len(value)} values"
    try:
        if any(isinstance(part, Tensor) for part in parts_of(value, most=100)):
            return f"a {type(value).__name__} with tensors"
    except ValueError:  # its representation may be endless
        return f"a large {type(value).__name__}"
    whole = ascii(value)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}..."


def parts_of(value: Any, most: int = _MAX_PARTS, depth: int = _MAX_DEPTH) -> Iterator[Any]:
    """Yield a value and all of its parts, and those that occur twice twice. Code that visits them all is then safe.

    Args:
        value: nested dictionaries, lists, tuples, sets and namespaces; anything else is one part.
        most: largest number of parts.
        depth: largest depth.

    Raises:
        ValueError: if a limit is exceeded, or an integer has more than 64 bits; the caller adds the file.
    """
    count, pending = 0, [(value, 0)]
    while pending:
        part, level = pending.pop()
        yield part
        if type(part) is int and not -_MAX_INT <= part <= _MAX_INT:
            raise ValueError("it contains an integer of more than 64 bits")
        if isinstance(part, dict):
            parts = [*dict.keys(part), *dict.values(part)]
        elif isinstance(part, (list, tuple, set, frozenset)):
            parts = list(part)
        elif isinstance(part, Namespace):
            parts = list(vars(part).values())
        else:
            continue
        count += len(parts)
        if count > most:
            raise ValueError(f"it contains more than {most} values")
        if level == depth and parts:
            raise ValueError(f"it is nested more than {depth} levels deep")
        pending += [(item, level + 1) for item in parts]
