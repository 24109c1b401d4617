"""Building one slot for every layer: options given as a schedule over depth, and weights shared across it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from .registry import slot_class


class Reference:
    """A module as one sees it that does not own it.

    Deliberately not a Module, so that the owner is the only one to register its weights: a state dict has them once,
    and the sharing survives `to_empty` and `deepcopy`, which a shared Parameter would not.

    reads: the attribute of the module that is read, None if the module is called.
    """

    def __init__(self, module: nn.Module, reads: str | None = None) -> None:
        self.module: Any = module
        self.reads = reads


def references(model: nn.Module) -> Iterator[tuple[str, Reference]]:
    """All references in `model` and their names."""
    for name, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, Reference):
                yield f"{name}.{leaf}".removeprefix("."), value


class SharedBranch(Reference):
    """A module as another block sees it: the same weights with that block's own layer options."""

    def __init__(self, module: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.options = dict(options)

    @property
    def carries_input(self) -> bool:
        return getattr(self.module, "carries_input", False)

    @property
    def takes_mask(self) -> bool:
        return getattr(self.module, "takes_mask", False)

    @property
    def drops(self) -> bool:
        return getattr(self.module, "drops", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **self.options, **kwargs)

    def init_state(self, *args: Any) -> Any:
        return self.module.init_state(*args, **self.options)

    def flops_per_token(self, seq_len: int) -> int:
        return self.module.flops_per_token(seq_len, **self.options)


def branches(
    slot: str,
    name: str,
    options: Mapping[str, Any],
    depth: int,
    groups: int,
    share: bool,
    build: Callable[..., nn.Module],
) -> Iterator[nn.Module | SharedBranch]:
    """One branch a layer; `build(**options)` makes the module. `groups` consecutive runs of layers are of equal length;
    with `share`, only the first layer of each has a module of its own."""
    cls = slot_class(slot, name)
    schedule = partial(_at_layer, getattr(cls, "layer_options", ()), options)
    run = depth // groups
    module: Any = None
    for layer in range(depth):
        if share and layer % run:
            yield SharedBranch(module, schedule(layer))
        else:
            of_group = _of_group(getattr(cls, "group_options", ()), options, layer // run)
            module = build(**{**options, **of_group, **schedule(layer)})
            yield module


def _of_group(names: tuple[str, ...], options: Mapping[str, Any], group: int) -> dict[str, Any]:
    """The group options that are given as one entry a group, with their entry for `group`."""
    return {name: options[name][group] for name in names if isinstance(options.get(name), tuple)}


def _at_layer(names: tuple[str, ...], options: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The layer options that are set, with a schedule (a sequence of sequences) resolved to its entry for `layer`."""
    at = {}
    for name in names:
        if name in options:
            value = options[name]
            at[name] = value[layer % len(value)] if is_schedule(value) else value
    return at


def is_schedule(value: Any) -> bool:
    """Whether a layer option is given as one entry a layer."""
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(entry, tuple) for entry in value)
