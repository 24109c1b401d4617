"""Names for slot choices, assemblies and model presets, and the one function that turns a name into a model."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .hints import plain_hint

if TYPE_CHECKING:
    from .config import ModelConfig

SLOTS = ("mixer", "residual", "ffn", "head")
# Keywords the assembly itself gives to a slot's constructor; everything else keyword-only is an option of the user's.
CONTEXT = frozenset({"device", "dtype", "norm", "dropout", "num_layers"})
# So many names fit into a message.
LISTED = 20

_CHOICES: dict[str, dict[str, type]] = {slot: {} for slot in SLOTS}
_ASSEMBLIES: dict[str, Any] = {}
_MODELS: dict[str, Callable[[], "ModelConfig"]] = {}

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[[], "ModelConfig"])


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError that names what is unknown and the nearest known names, or if none is near all of them, of very many
    those that are nearest all the same."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif len(names) <= LISTED:
        hint = f"known: {', '.join(names)}"
    else:
        some = difflib.get_close_matches(str(name), names, n=LISTED, cutoff=0.0)
        hint = f"{len(names)} are known, such as {', '.join(some)}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def unknown_option(name: str, known: Iterable[str]) -> ValueError:
    """`unknown` for an option, but of one that only other choices have, what these are."""
    owners = [
        f"{slot}={choice!r}" for slot in SLOTS for choice in _CHOICES[slot] if name in slot_options([(slot, choice)])
    ]
    if owners:
        return ValueError(f"option {name!r} belongs to {' or '.join(owners)}, which is not chosen")
    return unknown("option", name, known)


def register_slot(slot: str, name: str) -> Callable[[C], C]:
    """Class decorator: makes the class the choice `name` of `slot` ("mixer", "residual", "ffn" or "head").

    The constructor's keyword-only parameters, apart from `device`, `dtype`, `norm`, `dropout` and `num_layers`, become
    options of every model that chooses it. Positional parameters are given by the assembly:
    mixer `(dim)`, residual `(branch, dim, layer_index)`, ffn `(dim, hidden_dim)`, head `(dim, num_classes, embedding)`.

    Raises ValueError for an unknown slot and for a name that is taken.
    """
    if slot not in _CHOICES:
        raise unknown("slot", slot, SLOTS)

    def add(cls: C) -> C:
        _add(_CHOICES[slot], slot, name, cls)
        return cls

    return add


def register_assembly(kind: str) -> Callable[[C], C]:
    """Class decorator: `kind` names a model class, built as `cls(config, device=…, dtype=…)`, with `config_class`."""

    def add(cls: C) -> C:
        _add(_ASSEMBLIES, "assembly", kind, cls)
        return cls

    return add


def register_model(name: str) -> Callable[[F], F]:
    """Decorator: `name` becomes a preset; the function takes nothing and returns a `ModelConfig`.

    Raises ValueError for a name that is taken.
    """

    def add(preset: F) -> F:
        if name in _ASSEMBLIES:
            raise ValueError(f"model {name!r} has the name of an assembly")
        _add(_MODELS, "model", name, preset)
        return preset

    return add


def _add(table: dict[str, Any], what: str, name: str, entry: object) -> None:
    if name in table:
        raise ValueError(f"{what} {name!r} is already registered")
    table[name] = entry


def slot_choices(slot: str) -> list[str]:
    """The registered names for one slot, sorted."""
    return sorted(_CHOICES[slot])


def slot_class(slot: str, name: str) -> type:
    """The class registered as `name` in `slot`; ValueError with the nearest names if there is none."""
    if not isinstance(name, str) or name not in _CHOICES[slot]:
        raise unknown(slot, name, _CHOICES[slot])
    return _CHOICES[slot][name]


def slot_keywords(cls: type) -> set[str]:
    """Every keyword-only parameter of a slot's constructor, options and context alike."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def slot_hints(cls: type) -> dict[str, Any]:
    """The types of the keyword-only parameters of a slot's constructor that have a plain one."""
    parameters = inspect.signature(cls).parameters
    hints = {name: plain_hint(parameters[name].annotation) for name in slot_keywords(cls)}
    return {name: hint for name, hint in hints.items() if hint is not None}


def slot_options(choices: Iterable[tuple[str, str]]) -> set[str]:
    """The options that choices for slots, (slot, name), offer together."""
    return set().union(*(slot_keywords(slot_class(slot, name)) for slot, name in choices)) - CONTEXT


def build_slot(slot: str, name: str, *args: object, **keywords: object) -> Any:
    """Construct a slot's class from its positional arguments and those of `keywords` that it takes."""
    cls = slot_class(slot, name)
    accepted = slot_keywords(cls)
    return cls(*args, **{key: value for key, value in keywords.items() if key in accepted})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a glob, sorted: `list_models("grassmann*")`."""
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def assembly_class(kind: str) -> Any:
    """The model class of an assembly kind; ValueError with the nearest names if there is none."""
    if kind not in _ASSEMBLIES:
        raise unknown("kind", kind, _ASSEMBLIES)
    return _ASSEMBLIES[kind]


def model_config(name: str, **overrides: Any) -> "ModelConfig":
    """The config of a preset or of an assembly kind's defaults, with overrides applied; see `create_model`."""
    if name in _MODELS:
        config = _MODELS[name]()
    elif name in _ASSEMBLIES:
        config = _ASSEMBLIES[name].config_class(kind=name)
    else:
        raise unknown("model", name, [*_MODELS, *_ASSEMBLIES])
    return config.override(**overrides)


def create_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> Any:
    """Build a model (an `nn.Module`) by the name of a preset (`list_models()`) or of an assembly kind ("lm",
    "mlm" or "vision").

    Overrides are fields of the `ModelConfig` (`dim=128`, `mixer="attention"`, …) or options of the chosen slots
    (`offsets=(1, 2, 4)`, `num_heads=8`, …); an option that two slots share goes to both. When an override replaces a
    slot choice, the preset's options that the new choice does not have are dropped.

    Raises ValueError for an unknown model, field, option or slot choice, with the nearest names.
    """
    config = model_config(name, **overrides)
    return assembly_class(config.kind)(config, device=device, dtype=dtype)
