"""What a benchmark is made of: settings, rivals, and the functions that rivals are built with."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..testing import normal

Step = Callable[[], Any]
Values = dict[str, Any]
Builder = Callable[[Values, torch.dtype, torch.device], dict[str, Step]]

_imported: set[str] = set()


class Unavailable(Exception):
    """A rival cannot run here; the message is the reason."""


class Disagreement(Exception):
    """Two rivals that should compute the same do not."""


@dataclass(frozen=True)
class Setting:
    """One problem size, or what else a table has a row for."""

    id: str
    values: Values


@dataclass(frozen=True)
class Rival:
    """One way to do the work.

    build(setting values, dtype, device) gives a function for each mode it has ("forward", "forward+backward", "step",
    …), none if the setting is not for it, and, as "check", one whose result (a tensor, or a tuple of them) must agree
    with the other rivals', or with that of the function it gives as "truth": the same mathematics in float64. Builders
    raise Unavailable.

    foreign: the work is done by somebody else's package; where that fails or disagrees, the rival is listed with the
    reason, and the others are measured all the same. recordable: False for what waits for the device or decides on the
    host, and cannot be a CUDA graph.
    """

    name: str
    build: Builder
    foreign: bool = False
    recordable: bool = True


@dataclass(frozen=True)
class Benchmark:
    """What is measured for one op.

    settings: on a CPU, and on a GPU where `gpu_settings` has none. ours: the rival that the ratios are of. flops and
    moved: arithmetic and bytes that mode cannot do without, for the roof. tolerance: largest relative difference of the
    checked results, by dtype.
    """

    name: str
    title: str
    ours: str
    settings: Sequence[Setting]
    rivals: Sequence[Rival]
    flops: Callable[[Values, str], float]
    moved: Callable[[Values, str, int], float]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-4, torch.bfloat16: 3e-2})
    gpu_settings: Sequence[Setting] = ()

    def settings_on(self, device: torch.device) -> Sequence[Setting]:
        return self.gpu_settings if device.type == "cuda" and self.gpu_settings else self.settings


def with_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    truth: Callable[..., Any] | None = None,
    grads: Sequence[Tensor] = (),
) -> dict[str, Step]:
    """The modes of a differentiable function of one or more outputs: `inputs` that require gradients get them.

    truth: the same mathematics in float64, called with the inputs in float64, for the same gradients of the outputs.
    grads: these gradients, else random ones.
    """
    wanted = [t for t in inputs if t.requires_grad]
    if not grads:
        outputs = tensors(function(*inputs))
        grads = [normal(*out.shape, seed=7 + k).to(out.device, out.dtype) for k, out in enumerate(outputs)]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), wanted, grads)

    modes: dict[str, Step] = {"forward": forward, "forward+backward": both}
    modes["check"] = lambda: (*tensors(forward()), *both())
    if truth is not None:
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        exact = [grad.double() for grad in grads]
        modes["truth"] = lambda: with_gradients(truth, wide, grads=exact)["check"]()
    return modes


def of_kind(kind: str) -> Callable[[Builder], Builder]:
    """For a builder of a benchmark whose settings are of several kinds: it has nothing to say about the others."""

    def narrowed(builder: Builder) -> Builder:
        return lambda v, dtype, device: builder(v, dtype, device) if v["kind"] == kind else {}

    return narrowed


def tensors(value: Any) -> list[Tensor]:
    return [value.detach()] if isinstance(value, Tensor) else [t.detach() for t in value]


def without_check(steps: dict[str, Step]) -> dict[str, Step]:
    """The modes of a rival that computes another function: there is nothing to compare."""
    return {mode: step for mode, step in steps.items() if mode not in ("check", "truth")}


def package(name: str, install: str, device: torch.device | None = None) -> Any:
    """A module of somebody else's package, or Unavailable with what is missing.

    install: what pip calls it. device: given for what runs on an NVIDIA GPU alone.
    """
    if device is not None and device.type != "cuda":
        raise Unavailable("needs an NVIDIA GPU")
    try:
        module = importlib.import_module(name)
    # What such a package raises where it finds no driver or compiler can be anything.
    except Exception as error:
        top = name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise Unavailable(f"{top} is not installed: pip install {install}") from error
        raise Unavailable(f"{name} does not import ({summary(error)}): pip install {install}") from error
    _imported.add(name.partition(".")[0])
    return module


def packages() -> dict[str, str]:
    """Distributions of the modules that `package` has given so far, with their versions."""
    owners = importlib.metadata.packages_distributions() if _imported else {}
    names = sorted({owner for module in _imported for owner in owners.get(module, ())})
    return {name: importlib.metadata.version(name) for name in names}


def summary(error: Exception) -> str:
    """One line, without what would end a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")
