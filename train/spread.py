"""A model spread over processes: replicated (DDP) or sharded (FSDP2), behind one interface for the loop."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from . import parallel
from .optim import route


class Spread:
    """The processes' copies or shards of `models`, the first of which is trained.

    mode: "none", "ddp" or "fsdp". module: what the loss is computed with. mesh: of the shards, None without any.
    Parameters on a manifold stay whole in every process: a class's basis must not be cut. So do scalars.
    """

    def __init__(self, models: list[nn.Module], mode: str, device: torch.device) -> None:
        self.model, self.mode = models[0], mode
        self.module: nn.Module = self.model
        self.mesh: DeviceMesh | None = None
        if mode == "ddp":
            # Statistics of batch normalisation are averaged by `after_step`, not overwritten by those of process 0.
            self.module = DistributedDataParallel(self.model, broadcast_buffers=False)
        elif mode == "fsdp":
            self.mesh = init_device_mesh(device.type, (parallel.size(),))
            for model in models:
                _shard(model, self.mesh)
        self.replicated = [p for p in self.model.parameters() if mode == "fsdp" and not isinstance(p, DTensor)]
        self._norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    def backward_of(self, last: bool) -> AbstractContextManager[Any]:
        """Entered for a micro-batch: gradients are exchanged by the last one of a step alone."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that the norm of all of them is at most `limit`; the norm before."""
        if self.mode != "fsdp":
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for parameter in self.replicated:
            if parameter.grad is not None:
                parameter.grad.copy_(parallel.mean(parameter.grad))
        sharded = [p for p in self.model.parameters() if isinstance(p, DTensor)]
        # Two kinds of tensors do not mix in one call.
        parts = [[p for p in part if p.grad is not None] for part in (sharded, self.replicated)]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts if part]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        if limit < math.inf:
            for part in parts:
                torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
        return norm

    def after_step(self) -> None:
        """Average the running statistics of batch normalisation, which each process takes from its own rows."""
        if parallel.size() == 1 or not self._norms:
            return
        statistics: list[Any] = [tensor for norm in self._norms for tensor in (norm.running_mean, norm.running_var)]
        flat = parallel.mean(torch.cat([tensor.flatten() for tensor in statistics]))
        for tensor, piece in zip(statistics, flat.split([t.numel() for t in statistics]), strict=True):
            tensor.copy_(piece.view_as(tensor))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While entered, `model.state_dict()` has whole tensors in process 0. All processes enter together."""
    if not isinstance(model, FSDPModule):
        yield
        return
    whole = {}
    for name, tensor in model.state_dict().items():
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        whole[name] = value if parallel.is_main() else None

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update(whole)

    hook = model.register_state_dict_post_hook(fill)
    try:
        yield
    finally:
        hook.remove()


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors or shards, whichever the model has."""
    own = model.state_dict()
    model.load_state_dict({name: _like(own[name], value) if name in own else value for name, value in state.items()})


def shard_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Cut state that has been loaded whole the way the parameters are cut."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = _like(parameter, value)


def _like(target: Tensor, value: Tensor) -> Tensor:
    if not isinstance(target, DTensor) or isinstance(value, DTensor) or value.shape != target.shape:
        return value
    # Every process has the whole: nothing is to be sent.
    whole = value.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no other memory layout
    # FSDP cuts dimension 0, which a scalar does not have.
    owned = [(p, module) for module in model.modules() for p in module.parameters(recurse=False)]
    kept = {p for p, owner in owned if route(p, owner) == "manifold" or p.ndim == 0}
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    # Residuals add out of place: views that a branch returns do no harm.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for unit in (*_units(model), model):
        fully_shard(unit, mesh=mesh, ignored_params=kept)
    for method in getattr(model, "forward_methods", ()):
        register_fsdp_forward_method(model, method)
    for name, parameter in model.named_parameters():
        # Shards are new parameters: how the optimiser treats them goes along.
        vars(parameter).update(marks[name])


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered and freed as one: the branches of grassland's blocks, else the entries of the outermost lists
    of modules. A module that is used twice, or shares parameters, belongs to the whole."""
    branches = (getattr(module, "branch", None) for module in model.modules())
    found = [branch for branch in branches if isinstance(branch, nn.Module)] or list(_entries(model))
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    calls = Counter(map(id, found))
    return [m for m in found if calls[id(m)] == 1 and {owners[id(p)] for p in m.parameters()} == {1}]


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child
        else:
            yield from _entries(child)
