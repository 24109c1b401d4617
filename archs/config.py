"""What it takes to rebuild a model: sizes, one choice for each slot, and the options of those choices."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..kernels import dispatch
from .hints import described, fits, plain_hint
from .registry import SLOTS, slot_class, slot_hints, slot_options, unknown, unknown_option

SHAREABLE = ("mixer", "ffn")
NORMS = ("post", "pre")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model and one choice for each slot.

    kind: assembly ("lm", "mlm" or "vision"). vocab_size, max_len: rows of the token and position embeddings. dim,
    depth, ffn_dim: model width, number of blocks, hidden width of the ffn. dropout: probability in [0, 1). norm: "post"
    or "pre". mixer, residual, ffn, head: registered slot choices. share: which of ("mixer", "ffn") have one set of
    weights for all blocks; norms stay individual. share_groups: into how many runs of equal length the blocks are
    divided, each with a set of its own. scaled_init: whether the weights that mixers and ffns end in start 1/√(2 depth)
    times as large as others, as in GPT-2; a mixer that carries its input keeps its own. options: keyword arguments of
    the chosen slots' constructors; a slot's `group_options` (num_experts, top_k and capacity_factor of "shared_moe")
    may be tuples of one entry a group.

    Raises ValueError that names the field, its value and what is allowed.
    """

    kind: str = "lm"
    vocab_size: int = 30522
    max_len: int = 128
    dim: int = 256
    depth: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.0
    norm: str = "post"
    mixer: str = "grassmann"
    residual: str = "plain"
    ffn: str = "mlp"
    head: str = "tied"
    share: tuple[str, ...] = ()
    share_groups: int = 1
    scaled_init: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in ((f.name, plain_hint(f.type)) for f in fields(self)):
            # Numbers are checked where their range is.
            if hint in (bool, str) and not fits(getattr(self, name), hint):
                raise ValueError(f"{name} must be {described(hint)}, got {getattr(self, name)!r}")
        for name in ("vocab_size", "max_len", "dim", "depth", "ffn_dim", "share_groups"):
            self._check_size(name)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if not isinstance(self.share, tuple | list) or not all(name in SHAREABLE for name in self.share):
            raise ValueError(f"share must be a tuple of names from {SHAREABLE}, got {self.share!r}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of option names to values, got {self.options!r}")
        if self.depth % self.share_groups:
            raise ValueError(f"share_groups must be a divisor of depth={self.depth}, got {self.share_groups}")
        object.__setattr__(self, "share", tuple(self.share))
        object.__setattr__(self, "options", {name: _frozen(value) for name, value in self.options.items()})
        self._check_options()

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def _check_options(self) -> None:
        slots = self._slots({})
        known = slot_options(slots)
        for name in self.options:
            if name not in known:
                raise unknown_option(name, known)
        for slot, choice in slots:
            self._check_types(slot_class(slot, choice))
        if (backend := self.options.get("backend")) is not None:
            dispatch.requested(backend)
        grouped = {name for slot, choice in slots for name in _group_options(slot, choice)}
        for name, value in self.options.items():
            if name in grouped & self._tuples() and len(value) != self.share_groups:
                raise ValueError(
                    f"{name} must be one value, or one for each of share_groups={self.share_groups}, got {value!r}"
                )
        if self.share_groups > 1 and not self.share and not grouped & self._tuples():
            raise ValueError(f"share_groups={self.share_groups} needs something that the blocks share, got share=()")
        for slot, choice in slots if self.scaled_init else ():
            cls = slot_class(slot, choice)
            if slot in SHAREABLE and not hasattr(cls, "outputs") and not getattr(cls, "carries_input", False):
                raise ValueError(f"scaled_init=True needs to know what {slot} {choice!r} ends in: it has no outputs()")

    def _check_types(self, cls: type) -> None:
        several, hints = getattr(cls, "group_options", ()), slot_hints(cls)
        for name in hints.keys() & self.options.keys():
            value, hint = self.options[name], hints[name]
            values = value if name in several and isinstance(value, tuple) else (value,)
            if not all(fits(entry, hint) for entry in values):
                raise ValueError(f"{name} must be {described(hint)}, got {value!r}")

    def _tuples(self) -> set[str]:
        return {name for name, value in self.options.items() if isinstance(value, tuple)}

    @property
    def choices(self) -> dict[str, str]:
        """The choice made for each slot."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def _slots(self, changed: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The slots with their choices once the fields `changed` are; twice one whose blocks differ."""
        return [(slot, changed.get(slot, choice)) for slot, choice in self.choices.items()]

    def override(self, **overrides: Any) -> "ModelConfig":
        """A copy with fields replaced and options set, both given flat; ValueError with the nearest names if unknown.

        Options of this config that no slot of the result has (because the slot's choice changed) are dropped.
        """
        names = {f.name for f in fields(self)} - {"kind", "options"}
        if not isinstance(options := overrides.pop("options", {}), Mapping):
            raise ValueError(f"options must be a mapping of option names to values, got {options!r}")
        given = {**options, **overrides}
        changed = {name: value for name, value in given.items() if name in names}
        known = slot_options(self._slots(changed))
        for name in sorted(given.keys() - names - known):
            raise unknown_option(name, names | known)
        kept = {name: value for name, value in self.options.items() if name in known}
        chosen = {**kept, **{name: value for name, value in given.items() if name not in names}}
        return replace(self, **changed, options=chosen)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `json.dumps` takes; tuples become lists."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; lists become tuples again. ValueError for an unknown key."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("model config key", name, known)
        return cls(**{name: value if name == "options" else _frozen(value) for name, value in values.items()})


def _group_options(slot: str, choice: str) -> tuple[str, ...]:
    return getattr(slot_class(slot, choice), "group_options", ())


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
