"""What a model's output looks like: run it without a trace, and compare two outputs by structure."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import evaluating


@torch.no_grad()
def probe(model: nn.Module, example: Any) -> Any:
    """The output of `model` in evaluation mode; its mode and the random generators stay as they were.

    example: a tensor, a tuple of arguments, or a mapping of keywords.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), evaluating(model):
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


def difference(before: Any, after: Any, name: str = "output") -> str | None:
    """The first difference of two outputs in structure, shape, dtype or device, in words; None if there is none."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        ours, theirs = _tensor(before), _tensor(after)
        return None if ours == theirs else f"{name} was {ours} and is {theirs}"
    if type(before) is not type(after):
        return f"{name} was {type(before).__name__} and is {type(after).__name__}"
    if isinstance(before, Mapping):
        if list(before) != list(after):
            return f"{name} had the entries {list(before)} and has {list(after)}"
        return _first((before[key], after[key], f"{name}.{key}") for key in before)
    if isinstance(before, Sequence) and not isinstance(before, str):
        if len(before) != len(after):
            return f"{name} had {len(before)} entries and has {len(after)}"
        return _first((a, b, f"{name}[{index}]") for index, (a, b) in enumerate(zip(before, after, strict=True)))
    return None


def _first(pairs: Any) -> str | None:
    return next((found for a, b, name in pairs if (found := difference(a, b, name)) is not None), None)


def _tensor(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
