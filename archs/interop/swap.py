"""Reversible replacement of modules in any torch model.

report = swap(model, {nn.LayerNorm: lambda old: nn.RMSNorm(old.normalized_shape)}, where="encoder.*", example=x)
print(report)
report.undo()
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..sharing import Reference, references
from .probe import difference, probe

Factory = Callable[..., nn.Module]
Key = type[nn.Module] | str
Where = str | Callable[[str], bool]
# Names in the text of errors and reports; the rest is counted.
SHOWN = 8


@dataclass(frozen=True)
class Site:
    """A place in the model: the attribute `leaf` of `parent`, and the qualified names under which it is reached."""

    parent: nn.Module | Reference
    leaf: str
    names: list[str]

    def set(self, module: nn.Module) -> None:
        setattr(self.parent, self.leaf, module)

    def get(self) -> nn.Module | None:
        return getattr(self.parent, self.leaf, None)


@dataclass(frozen=True)
class Replacement:
    """One module replaced: where it stands, the old one and the new one.

    missing: public attributes of the old module that the new one has not; code of the model that reads them will fail.
    """

    sites: list[Site]
    old: nn.Module
    new: nn.Module
    missing: list[str]

    @property
    def names(self) -> list[str]:
        """The qualified names of the module, several if it is shared."""
        return [name for site in self.sites for name in site.names]

    def __str__(self) -> str:
        text = f"{_some(self.names)}: {_describe(self.old)} -> {_describe(self.new)}"
        return text + (f"; without {_some(self.missing)}" if self.missing else "")


@dataclass
class SwapReport:
    """What `swap` has done; `print` it, `undo` it, or use it as a context manager that undoes it at the end.

    parameters_before, parameters_after: numbers of parameters of the model, (all, trainable), shared ones once.
    """

    replaced: list[Replacement]
    parameters_before: tuple[int, int]
    parameters_after: tuple[int, int]
    active: bool = field(default=True)

    def undo(self) -> None:
        """Put the old modules back, the very same objects; nothing happens the second time.

        ValueError, with nothing changed, if something else has taken a new module's place since: undo that first.
        """
        if not self.active:
            return
        sites = [(site, replacement) for replacement in self.replaced for site in replacement.sites]
        for site, replacement in sites:
            if site.get() is not replacement.new:
                raise ValueError(f"{site.names[0]} is no longer what swap put there; undo the later change first")
        for site, replacement in sites:
            site.set(replacement.old)
        self.active = False

    def __enter__(self) -> "SwapReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        places = sum(len(replacement.sites) for replacement in self.replaced)
        head = f"{len(self.replaced)} modules replaced in {places} places" + ("" if self.active else ", undone")
        (before, trainable_before), (after, trainable) = self.parameters_before, self.parameters_after
        counts = f"parameters {before:,} -> {after:,}, trainable {trainable_before:,} -> {trainable:,}"
        return "\n".join([head, *(f"  {replacement}" for replacement in self.replaced), counts])


def swap(
    model: nn.Module, replacements: Mapping[Key, Factory], where: Where | None = None, *, example: Any = None
) -> SwapReport:
    """Replace modules inside `model`, in place and reversibly.

    replacements: class (with its subclasses) or glob of qualified names ("layers.*.mlp") to a factory of the new
    module, called as `factory(old)` or, if it has a second required parameter or one called name, `factory(old, name)`;
    a parameter called model gets the model. The first key that fits counts. The new module may contain the old one.
    where: glob or predicate of qualified names that narrows all keys.

    Of modules inside one another the outermost is replaced. A module that several places share is replaced once, and
    the new one is shared by those of them that match; blocks that share another block's weights follow that block, and
    a tied head follows the embedding. What is new gets the device and floating dtype of the old module's first
    parameter (of the model's, if it has none), its training mode, and, if all its parameters are frozen, is frozen
    too; the old modules are not touched. Hooks stay with the module they are on.

    example: inputs of the model (a tensor, a tuple of arguments or a mapping of keywords); the model then runs on them
    before and after, in evaluation mode, and its output must keep structure, shapes, dtypes and devices.

    Raises ValueError when nothing matches, the check fails or something still uses what the model no longer has,
    TypeError when a factory returns no module; the model is then as it was.
    """
    found = _find(model, replacements, where)
    before = None if example is None else probe(model, example)
    parameters, outside = _count(model), _outside(model)
    replaced = [_build(model, sites, old, factory) for old, (sites, factory) in found.items()]
    for replacement in replaced:
        for site in replacement.sites:
            site.set(replacement.new)
    report = SwapReport(replaced, parameters, _count(model))
    try:
        if lost := [name for reference, name in _outside(model).items() if reference not in outside]:
            raise ValueError(
                f"{_some(lost)} would use what is no longer in the model: replace the shared module itself, and what a "
                "head is tied to by a module with a weight"
            )
        if example is not None:
            _check(model, example, before)
    except BaseException:
        report.undo()
        raise
    return report


def _find(
    model: nn.Module, replacements: Mapping[Key, Factory], where: Where | None
) -> dict[nn.Module, tuple[list[Site], Factory]]:
    """Old module → its sites and its factory, in the model's order."""
    for key in replacements:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"replacements: a key must be a subclass of nn.Module or a glob of names, got {key!r}")
    found: dict[nn.Module, tuple[list[Site], Factory]] = {}
    for parent, leaf, name, old, factory in _matches(model, "", partial(_factory, replacements, where), ()):
        sites = found.setdefault(old, ([], factory))[0]
        known = next((site for site in sites if site.parent is parent and site.leaf == leaf), None)
        if known is None:
            sites.append(Site(parent, leaf, [name]))
        else:
            known.names.append(name)
    if not found:
        keys = ", ".join(key if isinstance(key, str) else key.__name__ for key in replacements) or "an empty mapping"
        narrowed = "" if where is None else f" where {where!r}"
        kinds = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
        raise ValueError(f"nothing in {type(model).__name__} matches {keys}{narrowed}; inside it are {_some(kinds)}")
    return found


def _matches(
    module: nn.Module, prefix: str, choose: Callable[[str, nn.Module], Factory | None], above: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Module, str, str, nn.Module, Factory]]:
    for leaf, child in module._modules.items():
        if child is None or child in above:
            continue
        name = f"{prefix}{leaf}"
        factory = choose(name, child)
        if factory is not None:
            yield module, leaf, name, child, factory
        else:
            yield from _matches(child, f"{name}.", choose, (*above, module))


def _factory(replacements: Mapping[Key, Factory], where: Where | None, name: str, module: nn.Module) -> Factory | None:
    if where is not None and not (fnmatchcase(name, where) if isinstance(where, str) else where(name)):
        return None
    for key, factory in replacements.items():
        if fnmatchcase(name, key) if isinstance(key, str) else isinstance(module, key):
            return factory
    return None


def _build(model: nn.Module, sites: list[Site], old: nn.Module, factory: Factory) -> Replacement:
    name = sites[0].names[0]
    existing = {id(module) for module in model.modules()}
    new = _call(factory, old, name, model)
    if not isinstance(new, nn.Module):
        raise TypeError(f"the factory for {name} must return a module, got {type(new).__name__}")
    _adapt(model, old, new, existing)
    sites = [*sites, *_followers(model, old, new)]
    return Replacement(sites, old, new, [name for name in _public(old) if getattr(new, name, None) is None])


def _followers(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[Site]:
    """What uses the old module without owning it, and can use the new one: a head is tied to what has a weight."""
    for name, reference in references(model):
        reads = reference.reads
        if reference.module is old and (reads is None or isinstance(getattr(new, reads, None), Tensor)):
            yield Site(reference, "module", [name])


def _outside(model: nn.Module) -> dict[Reference, str]:
    """References to modules that are not in the model, and their names."""
    inside = set(model.modules())
    return {reference: name for name, reference in references(model) if reference.module not in inside}


def _call(factory: Factory, old: nn.Module, name: str, model: nn.Module) -> Any:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a builtin without a signature
        return factory(old)
    asked = {key: value for key, value in (("name", name), ("model", model)) if key in [*parameters][1:]}
    if asked:
        return factory(old, **asked)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in positional and p.default is inspect.Parameter.empty]
    return factory(old, name) if len(required) > 1 else factory(old)


def _adapt(model: nn.Module, old: nn.Module, new: nn.Module, existing: set[int]) -> None:
    """Give what is new in `new` the old module's device, dtype, mode and frozenness; leave what the model has."""
    kept = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    like = next((p for p in (*old.parameters(), *model.parameters()) if p.is_floating_point()), None)
    frozen = not any(p.requires_grad for p in old.parameters()) and next(old.parameters(), None) is not None

    def move(tensor: Tensor) -> Tensor:
        if like is None or id(tensor) in kept:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    for module in new.modules():
        if id(module) not in existing:
            module._apply(move, recurse=False)
            module.training = old.training
    for parameter in new.parameters():
        if frozen and id(parameter) not in kept:
            parameter.requires_grad_(False)


def _public(module: nn.Module) -> list[str]:
    names = [*vars(module), *module._parameters, *module._buffers, *module._modules]
    return [name for name in names if not name.startswith("_") and getattr(module, name, None) is not None]


def _count(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _check(model: nn.Module, example: Any, before: Any) -> None:
    try:
        after = probe(model, example)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"the model does not run on example after the replacement: {error}") from error
    if (changed := difference(before, after)) is not None:
        raise ValueError(f"the replacement changes the model's output: {changed}")


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} ({_count(module)[0]:,})"


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["Replacement", "SwapReport", "swap"]
