"""One optimiser object for a model: parameters are routed to groups, and groups to the algorithm that suits them."""

import importlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import nn

from .muon import muon
from .riemannian import GrassmannSGD

__all__ = ["OPTIMIZERS", "GrassmannSGD", "Joined", "build_optimizer", "parameter_groups", "route"]

OPTIMIZERS = ("adamw", "lamb", "muon", "sgd")


def route(parameter: nn.Parameter, owner: nn.Module) -> str:
    """The group of a parameter of the module `owner`, as far as these two tell: see `parameter_groups`."""
    for name, group in getattr(owner, "optim_groups", {}).items():
        if _attribute(owner, name) is parameter:
            return group
    marked = getattr(parameter, "optim_group", None)
    if marked is not None:
        return marked
    vector = sum(size > 1 for size in parameter.shape) < 2
    # The decay rates of Mamba are a matrix by their shape alone.
    if vector or isinstance(owner, nn.Embedding) or getattr(owner, "A_log", None) is parameter:
        return "no_decay"
    return "matrix" if parameter.ndim == 2 else "decay"


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of `model` by group, each once, in the order of `model.named_parameters()`.

    The groups are "matrix", "decay", "no_decay" and "manifold": orthonormal bases of `parameter.subspace_dim` rows, as
    in `GrassmannHead.weight`. Who decides, the first that does:

    1. a layer, by `optim_groups`, a dict of the names of parameters in it and their groups, because copies and loaded
       tensors keep no attributes;
    2. a mark `parameter.optim_group`;
    3. a model of timm's, by the names and patterns of `no_weight_decay()`;
    4. embeddings, which are not decayed, whatever is tied to them;
    5. models of timm's and transformers', by `get_classifier()` and `get_output_embeddings()`, whose weights are
       "decay";
    6. the shape: vectors (norms, biases), of any number of dimensions, are not decayed, matrices are, and of these Muon
       takes the two-dimensional ones.
    """
    told = _told(model)
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "decay": [], "no_decay": [], "manifold": []}
    for owner, parameter in _owned_parameters(model):
        name = told.get(id(parameter)) or route(parameter, owner)
        if name not in groups:
            raise ValueError(f"optim_group must be one of {tuple(groups)}, got {name!r}")
        groups[name].append(parameter)
    return groups


def _told(model: nn.Module) -> dict[int, str]:
    """Groups, by the parameter's id, that depend on more than the module that owns the parameter first."""
    modules = list(model.modules())
    outputs = {id(layer.weight): "decay" for module in modules for layer in _outputs(module)}
    embeddings = {id(module.weight): "no_decay" for module in modules if isinstance(module, nn.Embedding)}
    undecayed = {
        id(parameter): "no_decay"
        for module in modules
        for pattern in _called(module, "no_weight_decay") or ()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if fnmatchcase(name, pattern)
    }
    marks = {id(p): p.optim_group for p in model.parameters() if hasattr(p, "optim_group")}  # type: ignore[attr-defined]
    layers = {
        id(_attribute(module, name)): group
        for module in modules
        for name, group in getattr(module, "optim_groups", {}).items()
    }
    return {**outputs, **embeddings, **undecayed, **marks, **layers}


def _outputs(module: nn.Module) -> Iterator[nn.Linear]:
    """The layers that give a model's logits."""
    for method in ("get_classifier", "get_output_embeddings"):
        found = _called(module, method)
        # A distilled model of timm's has two.
        for head in found if isinstance(found, tuple) else (found,):
            if isinstance(head, nn.Module):
                yield from (layer for layer in head.modules() if isinstance(layer, nn.Linear))


def _called(module: nn.Module, method: str) -> Any:
    return getattr(module, method)() if hasattr(module, method) else None


def _attribute(module: nn.Module, path: str) -> Any:
    """What a name with dots leads to, None if to nothing."""
    return reduce(lambda owner, name: getattr(owner, name, None), path.split("."), module)


def build_optimizer(
    model: nn.Module,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    *,
    head_lr: float | None = None,
    head_momentum: float = 0.9,
    momentum_mode: str = "official",
) -> torch.optim.Optimizer:
    """One optimiser for all trainable parameters of `model`, decaying weight matrices only.

    "adamw", "lamb" (timm's) and "sgd" (momentum `betas[0]`) take everything. "muon" takes the two-dimensional hidden
    matrices with an update scaled to AdamW's typical size, so that one `lr` and `weight_decay` serve both, and AdamW
    takes the rest. Whatever the name, "manifold" parameters (Grassmann heads) go to `GrassmannSGD` with
    `head_lr` (`lr` if None), `head_momentum` and `momentum_mode`, undecayed.

    Raises ValueError for an unknown name, and for "lamb" without timm.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {name!r}")
    groups = parameter_groups(model)
    manifold = groups.pop("manifold")
    parts = _euclidean(groups, name, lr, weight_decay, betas, eps) if any(groups.values()) or not manifold else []
    if manifold:
        parts.append(GrassmannSGD(manifold, lr if head_lr is None else head_lr, head_momentum, momentum_mode))
    return parts[0] if len(parts) == 1 else Joined(*parts)


def _euclidean(
    groups: dict[str, list[nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> list[torch.optim.Optimizer]:
    matrices = groups.pop("matrix")
    if name != "muon":
        groups["decay"] = matrices + groups["decay"]
    settings = _settings(groups, weight_decay)
    if name == "sgd":
        return [torch.optim.SGD(settings, lr=lr, momentum=betas[0])]
    if name == "lamb":
        return [_lamb(settings, lr, betas)]
    # Measured on 2 cores, 4 M parameters: fused 2 ms, one by one 10 ms, foreach 24 ms.
    options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    first = [muon(matrices, **options)] if name == "muon" and matrices else []
    rest = [torch.optim.AdamW(settings, lr=lr, betas=betas, eps=eps, fused=True)] if settings or not first else []
    return [*first, *rest]


class Joined(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters as one: joint groups, one state dict. The parts keep the state."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def _join(self) -> None:
        # The very dicts of the parts, so that a scheduler that sets a group's lr sets it for the part.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """ValueError for a group that no part has: which of them should step it is not known."""
        if not any(param_group is group for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ValueError("several optimisers joined take no further param_group: build one of all parameters")
        super().add_param_group(param_group)

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The states of all parameters, in a new dict."""
        return dict(chain.from_iterable(optimizer.state.items() for optimizer in self.optimizers))

    @state.setter
    def state(self, state: Any) -> None:
        """Torch's constructor sets an empty one."""

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part; the closure, if any, is evaluated once, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of one optimiser with the groups of all parts."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {first + index: values for index, values in own["state"].items()}
            for group in own["param_groups"]:
                groups.append({**group, "params": [first + index for index in group["params"]]})
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; ValueError if it comes from other groups."""
        groups = list(state_dict.get("param_groups", []))
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} groups, this optimiser has {len(self.param_groups)}")
        for optimizer in self.optimizers:
            own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            names = [name for group in own for name in group["params"]]
            state = {name: state_dict["state"][name] for name in names if name in state_dict["state"]}
            optimizer.load_state_dict({"state": state, "param_groups": own})
        self._join()


def parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimisers that hold the state of what `build_optimizer` returns."""
    return optimizer.optimizers if isinstance(optimizer, Joined) else (optimizer,)


def _lamb(settings: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    try:
        lamb: Any = importlib.import_module("timm.optim").Lamb
    except ImportError as error:
        raise ValueError("optimizer 'lamb' needs timm: pip install 'grassland[vision]'") from error
    # The loop clips the gradient; LAMB's own clipping would do it again.
    return lamb(settings, lr=lr, betas=betas, max_grad_norm=None)


def _owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, parameter


def _settings(groups: dict[str, list[nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    decays = {"decay": weight_decay, "no_decay": 0.0}
    return [{"params": params, "weight_decay": decays[name]} for name, params in groups.items() if params]
