"""The stream state of KromHC: streams, and a branch's output that has not joined them yet.

Waiting with X' = H_res X + h_post (x) y until the next sublayer asks for its input lets one kernel cross the boundary
and read the streams once. Whoever looks at the streams before gets them by the two-kernel path, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.kronecker import kronecker_open, kronecker_post, kronecker_step


class Recipe:
    """Streams as a stored tensor, or as another recipe with one addition."""

    def __init__(self, base: Recipe | Tensor, addition: tuple[Tensor, Tensor] | None, factors: tuple[int, ...]) -> None:
        self.base, self.addition, self.factors = base, addition, factors
        self.dtype: torch.dtype = base.dtype
        self.distance: int = base.distance + 1 if isinstance(base, Recipe) else 0
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The streams; those on the way are kept until they are asked for themselves, which the backward does next."""
        if isinstance(self.base, Tensor) or self.addition is None:
            return self.base if isinstance(self.base, Tensor) else self.base.value()
        value, self._value = self._value, None
        if value is None:
            before = self.base.value()
            self.base._value = before
            with torch.no_grad():
                value = kronecker_post(before, *self.addition, factors=self.factors)
        return value


class Request:
    """What autograd stores instead of the streams."""

    def __init__(self, recipe: Recipe, shape: torch.Size) -> None:
        self.recipe, self.shape = recipe, shape

    def tensor(self) -> Tensor:
        return self.recipe.value().view(self.shape)


# FSDP looks for the tensors that a layer takes and gives in dataclasses, and in older torches in pytrees.
@dataclass(eq=False, repr=False)
class StreamState:
    """Streams (…, n, C) whose newest addition may be pending. Behaves as the tensor it stands for.

    `KromHC.expand` makes one, `KromHC.forward` takes and gives one, `KromHC.reduce` ends it. `tensor()` is the
    streams; any torch function, operator, comparison, method or public attribute of a tensor also works on it, and
    settles the addition. What writes in place is for tensors alone.

    keep: how many additions apart the streams are stored for the backward; those between are computed again from the
    stored ones and the branches' outputs. 1 stores all.
    """

    _x: Tensor
    _factors: tuple[int, ...]
    _keep: int = 1
    _pending: tuple[Tensor, Tensor] | None = None
    _recipe: Recipe | None = None

    def __post_init__(self) -> None:
        # Mixed precision casts the streams, and a recipe gives what they were before.
        if self._recipe is not None and self._recipe.dtype != self._x.dtype:
            self._recipe = None

    def add(self, y: Tensor, h: Tensor) -> StreamState:
        """The state after the sublayer with coefficients h and branch output y; nothing is computed yet."""
        return StreamState(self.tensor(), self._factors, self._keep, (y, h), self._recipe)

    def tensor(self) -> Tensor:
        """The streams (…, n, C)."""
        if self._pending is not None:
            with self._saving():
                x = kronecker_post(self._x, *self._pending, factors=self._factors)
            self._become(self._joined(x))
        return self._x

    def read(self, weight: Tensor, bias: Tensor) -> tuple[StreamState, Tensor, Tensor]:
        """The settled state, and input u (…, C) and coefficients h of a sublayer; a pending addition joins in the same
        pass."""
        with self._saving():
            if self._pending is None:
                x, u, h = kronecker_open(self._x, weight, bias, factors=self._factors)
            else:
                x, u, h = kronecker_step(self._x, *self._pending, weight, bias, factors=self._factors)
        state = self._joined(x)
        # A layer that is computed again, by checkpointing, must find the state as it was. Without a backward none is,
        # and the old streams need not stay.
        if not torch.is_grad_enabled():
            self._become(state)
        return state, u, h

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    def sum(self, dim: Any = None, **options: Any) -> Tensor:
        """dim -2: the sum of the streams (…, C). H_res keeps it, so a pending addition mixes nothing.

        It is sum X + (sum h_post) y.

        Other dimensions, and the options of `Tensor.sum`, settle the addition first.
        """
        if dim != -2 or options:
            return self.tensor().sum(dim, **options)
        if self._pending is None:
            return self._x.sum(-2)
        y, h = self._pending
        n = self._x.shape[-2]
        joined = h[..., n : 2 * n].sum(-1, keepdim=True) * y.to(h.dtype)
        return (self._x.sum(-2, dtype=h.dtype) + joined).to(self._x.dtype)

    def check_graph(self) -> None:
        """ValueError if the gradient of the streams is lost: in the forward of an autograd.Function, such as
        checkpointing with use_reentrant=True, which passes on that of tensors alone."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _in_function():
            return
        if any(tensor.requires_grad for tensor in (self._x, *(self._pending or ()))):
            raise ValueError(
                "x must be a tensor, such as x.tensor(), in checkpointing with use_reentrant=True or another "
                "autograd.Function, which would lose the gradient of a StreamState; or use use_reentrant=False"
            )

    def _joined(self, x: Tensor) -> StreamState:
        """The state with its addition joined, whose streams are x."""
        recipe = self._recipe
        if self._keep > 1 and self._pending is not None and not torch.compiler.is_compiling():
            y, h = self._pending
            recipe = Recipe(
                recipe or Recipe(self._x.detach(), None, self._factors), (y.detach(), h.detach()), self._factors
            )
            recipe = recipe if recipe.distance < self._keep else None
        return StreamState(x, self._factors, self._keep, None, recipe)

    def _become(self, other: StreamState) -> None:
        self._x, self._pending, self._recipe = other._x, other._pending, other._recipe

    def _saving(self) -> Any:
        """While an op saves the streams for its backward: their recipe is saved in their place."""
        recipe, x = self._recipe, self._x
        # A compiler knows neither these hooks nor addresses, and decides itself what is stored.
        if recipe is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()

        def pack(saved: Tensor) -> Tensor | Request:
            here = saved.data_ptr() == x.data_ptr() and saved.numel() == x.numel()
            return Request(recipe, saved.shape) if here else saved

        def unpack(packed: Tensor | Request) -> Tensor:
            return packed.tensor() if isinstance(packed, Request) else packed

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*_settled(args), **_settled(dict(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return f"StreamState({self.tensor()!r})"


def _in_function() -> bool:
    """Whether, with gradients off, that is so for being in the forward of an autograd.Function: these and inference
    mode alone turn off forward-mode differentiation, too."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def _settled(value: Any) -> Any:
    if isinstance(value, StreamState):
        return value.tensor()
    if isinstance(value, list | tuple):
        return type(value)(map(_settled, value))
    return {key: _settled(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _operator(name: str) -> Callable[..., Any]:
    def call(self: StreamState, *args: Any, **options: Any) -> Any:
        return getattr(self.tensor(), name)(*_settled(args), **options)

    return call


# Python looks operators up on the class, past __getattr__. The hash stays that of the object, as with tensors.
_OPERATORS = """
    abs add array bool complex contains eq float floordiv ge getitem gt int iter le len lt matmul mod mul ne neg pos pow
    radd reversed rfloordiv rmatmul rmod rmul rpow rsub rtruediv sub truediv
"""
for _name in _OPERATORS.split():
    setattr(StreamState, f"__{_name}__", _operator(f"__{_name}__"))


@dataclass(frozen=True)
class Context:
    """What a state has besides its tensors. The recipe stays valid as long as nothing has been done to the streams."""

    factors: tuple[int, ...]
    keep: int
    recipe: Recipe | None = field(default=None, compare=False)
    streams: tuple[int, int] | None = field(default=None, compare=False)

    @staticmethod
    def of(state: StreamState) -> Context:
        known = None if state._recipe is None else _identity(state._x)
        return Context(state._factors, state._keep, state._recipe, known)

    def recipe_for(self, x: Any) -> Recipe | None:
        same = self.recipe is not None and isinstance(x, Tensor) and _identity(x) == self.streams
        return self.recipe if same else None


def _identity(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x._version


def _flatten(state: StreamState) -> tuple[list[Tensor], Context]:
    return [state._x, *(state._pending or ())], Context.of(state)


def _unflatten(tensors: Iterable[Any], context: Context) -> StreamState:
    x, *pending = tensors
    addition = (pending[0], pending[1]) if pending else None
    return StreamState(x, context.factors, context.keep, addition, context.recipe_for(x))


pytree.register_pytree_node(StreamState, _flatten, _unflatten, serialized_type_name=f"{__name__}.StreamState")
