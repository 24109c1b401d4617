"""Whether a value is of the type that an annotation names, and that type in words."""

import inspect
from functools import reduce
from operator import or_
from typing import Any, Literal, get_args, get_origin

PLAIN: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}


def plain_hint(annotation: Any) -> Any:
    """The type, if the annotation, perhaps a text, names nothing but `PLAIN` ones; None for others."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    names = text.split(" | ")
    return reduce(or_, (PLAIN[name] for name in names)) if set(names) <= PLAIN.keys() else None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an integer is a number, too, but a bool is none."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if parts:
        return any(fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def described(hint: Any) -> str:
    """A type in words."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {parts}"
    if get_origin(hint) is tuple:
        return f"{'several' if parts[-1] is ... else len(parts)} values, each {described(parts[0])}"
    if parts:
        return " or ".join(map(described, parts))
    return {int: "an integer", float: "a number", str: "text", bool: "True or False"}.get(hint, "None")
