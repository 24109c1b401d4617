"""Which backend an op runs on, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_C: Any = torch._C
in_vmap, in_legacy_vmap = _C._functorch.is_batchedtensor, _C._functorch.is_legacy_batchedtensor

BACKENDS = ("reference", "eager", "cpp", "triton", "cuda")
# The compiled ones of a device, the fastest first.
FASTEST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# The first compute capability that the kernels are made for.
OLDEST = (8, 0)
ENVIRONMENT = "GRASSLAND_BACKEND"
# Of the ops. A copy of the kernels under another package name has its own, so that both live in one process.
NAMESPACE = "grassland" if __package__ == "grassland.kernels" else re.sub(r"\W", "_", __package__ or "grassland")
PACKAGES = ("plucker", "kronecker", "subspace", "moe", "cross_entropy")


class BackendError(RuntimeError):
    """An explicitly requested backend is not there, or cannot take these inputs."""


@dataclass(frozen=True, eq=False)
class Op:
    """What an op offers: its name, its backends and the dtypes that each compiled backend takes."""

    name: str
    dtypes: dict[str, tuple[torch.dtype, ...]]

    @functools.cached_property
    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in BACKENDS if name in ("reference", "eager") or name in self.dtypes)


OPS: dict[str, Op] = {}


def register(name: str, **dtypes: tuple[torch.dtype, ...]) -> Op:
    """Declares an op and the dtypes of its compiled backends (`cpp=…, triton=…, cuda=…`)."""
    OPS[name] = Op(name, dtypes)
    return OPS[name]


@functools.cache
def extension_error() -> str | None:
    """Why grassland.kernels._C cannot be used, or None. The first call loads it."""
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return "the extension is not built: reinstall with a C++ compiler and pip install --no-build-isolation"
    try:
        importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return f"the extension is built but does not load with torch {torch.__version__}: {error}"
    return None


@functools.cache
def has_cuda_kernels() -> bool:
    return extension_error() is None and hasattr(torch.ops.grassland_cuda, "plucker_mix")


@functools.cache
def triton_error() -> str | None:
    """Why Triton kernels cannot be used, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Why no kernel is chosen on this GPU, or None. CUDA C++ has no code for it, and Triton's kernels spill."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    return "this GPU's compute capability is {}.{}, the kernels are made for {}.{} and later".format(*found, *OLDEST)


def missing(op: Op, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run on `backend` with tensors of this device and dtype, or None."""
    if backend not in op.backends:
        return f"{op.name} has no {backend} kernel; it has {', '.join(op.backends)}"
    if backend in ("reference", "eager"):
        return None
    home = "cpu" if backend == "cpp" or (backend == "triton" and interpreted()) else "cuda"
    if device.type != home:
        return f"the {backend} backend takes {home} tensors, got {device.type}"
    if dtype not in op.dtypes[backend]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in op.dtypes[backend])
        return f"the {backend} backend of {op.name} takes {allowed}, got {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        return triton_error()
    if backend == "cuda" and not has_cuda_kernels():
        return extension_error() or "the extension was built without CUDA: reinstall where nvcc and a CUDA torch are"
    return extension_error() or (too_old(device) if backend == "cuda" else None)


def fastest(op: Op, device: torch.device, dtype: torch.dtype, unfit: Collection[str] = ()) -> str:
    """The backend that runs `op` there if none is asked for; where none can, the one that would with its needs met.

    unfit: backends that cannot take the sizes at hand.
    """
    offered = () if too_old(device) else FASTEST.get(device.type, ())
    choices = [name for name in offered if name in op.backends and name not in unfit]
    ready = (name for name in choices if missing(op, name, device, dtype) is None)
    return next(ready, choices[-1] if choices else "eager")


class Opaque:
    """A custom op that is called past PyTorch's dispatcher, which takes as long as a small kernel, where nobody listens
    there: no derivative, no mode, nothing that traces or stands for other tensors."""

    def __init__(self, op: Any, body: Callable[..., Any], writes: bool) -> None:
        self.op, self.body, self.name = op, body, op._name
        self.writes = writes  # to its inputs, of which the dispatcher tells autograd
        self.register_fake, self.register_autograd = op.register_fake, op.register_autograd

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if self.writes or not unobserved(args) else self.body(*args)


def unobserved(args: tuple) -> bool:
    """Whether no derivative is recorded, nothing traces, and the tensors among them hold numbers of their own."""
    return not torch.is_grad_enabled() and untraced() and bare(args)


def untraced() -> bool:
    """Whether nothing traces, and no mode listens."""
    return not (torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() or _C._is_tracing())


def bare(args: tuple) -> bool:
    """Whether the tensors among them hold numbers of their own."""
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_meta or in_vmap(x) or in_legacy_vmap(x):
                return False
        elif isinstance(x, Tensor):
            return False
    return True


def batched(x: Tensor) -> bool:
    """Whether it stands for many: those of torch.vmap, or of autograd's is_grads_batched."""
    return in_vmap(x) or in_legacy_vmap(x)


def opaque(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Opaque]:
    """Makes a custom op of a function, whose operations keep the dtypes of their inputs under autocast, too."""

    def register_op(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def body(*args: Any) -> Any:
            if not _C._is_any_autocast_enabled():
                return function(*args)
            with _C._DisableAutocast():
                return function(*args)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", body, mutates_args=mutates_args, schema=schema)
        return Opaque(op, body, bool(mutates_args))

    return register_op


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: an opaque op would drop its
    derivatives without a word, or fail."""
    if torch.compiler.is_compiling():  # the op's registered derivative is seen there, but a tangent is not
        return forward_ad._current_level >= 0
    return _C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def requested(backend: str | None) -> str:
    """The backend asked for by argument or by $GRASSLAND_BACKEND, "" for none; the reference where `transformed`.

    Safe to trace.
    """
    name = backend or os.environ.get(ENVIRONMENT, "")
    if name and name not in BACKENDS:
        source = "backend" if backend else f"${ENVIRONMENT}"
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference" or not transformed():
        return name
    if name:
        raise BackendError(f"backend {name!r} takes no transform of torch.func and no forward mode; 'reference' does")
    return "reference"


@functools.cache
def implicit(op: Op, device: torch.device, dtype: torch.dtype, unfit: tuple[str, ...]) -> str:
    """The backend where none is asked for. What it depends on does not change in a process."""
    choice = fastest(op, device, dtype, unfit)
    return choice if missing(op, choice, device, dtype) is None else "eager"


def pick(op: Op, tensor: Tensor, backend: str = "", unfit: Collection[str] = ()) -> str:
    """The backend that runs `op` on `tensor`: the requested one, else the device's best that is not `unfit`.

    A request that cannot be met raises BackendError; without one, eager is the fallback. Called inside the opaque op.
    """
    if not backend:
        return implicit(op, tensor.device, tensor.dtype, tuple(unfit))
    reason = missing(op, backend, tensor.device, tensor.dtype)
    if reason is not None:
        raise BackendError(f"{op.name}: backend {backend!r} is not available: {reason}")
    return backend


def describe() -> dict[str, dict[str, str]]:
    """For each op and device type: the backend a float32 tensor gets, or why not the preferred one."""
    for package in PACKAGES:
        importlib.import_module(f"{__package__}.{package}")
    report: dict[str, dict[str, str]] = {}
    for op in OPS.values():
        report[op.name] = {}
        for device in map(torch.device, ("cpu", "cuda")):
            choice = fastest(op, device, torch.float32)
            reason = too_old(device) or missing(op, choice, device, torch.float32)
            report[op.name][device.type] = choice if reason is None else f"eager ({reason})"
    return report
