"""Packages that only some commands need."""

import importlib
from typing import Any


def optional(module: str, extra: str, package: str = "") -> Any:
    """The module, imported; ValueError that says what to install if it is not there.

    package: its name on PyPI, if it is not the first part of the module's. extra: grassland's extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise ValueError(f"{name} is not installed: pip install 'grassland[{extra}]'") from error
