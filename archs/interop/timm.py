"""A Grassmann or cosine head on any timm or torchvision classifier.

    model = timm.create_model("resnet18", num_classes=10)
    put_grassmann_head(model, subspace_dim=8)
    optimizer = build_optimizer(model, "sgd", lr=0.1, head_lr=0.1)
    model(images, labels=labels).backward()

timm's own optimiser factory knows no manifold: use `grassland.train.optim.build_optimizer`, which reads the mark of
the head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads.cosine import CosineHead
from ..heads.grassmann import GrassmannHead, grassmann_heads


def put_grassmann_head(
    model: nn.Module,
    num_classes: int | None = None,
    subspace_dim: int = 8,
    scale: float = 25.0,
    *,
    backend: str | None = None,
) -> nn.Module:
    """Replace the classifier of `model` by a `GrassmannHead` of the same width, in place; returns the model.

    The classifier is the `nn.Linear` that the model's timm configuration names, else the last one. Every classifier
    of a distilled model is replaced. num_classes: None for as many as before. The head gets the old one's device, and
    its dtype if that is float32 or float64, else float32.

    `model(images, labels=labels, label_smoothing=0.0)` is then the mean cross entropy by `GrassmannHead.loss`, whose
    logits are never in memory; labels are classes (B,) int64 or probabilities (B, num_classes). Without labels the
    model gives logits, as ever. A distilled model's loss is that of the logits it gives; one whose auxiliary
    classifiers give logits too, as GoogLeNet's in training, takes no labels (ValueError).

    With timm models, `reset_classifier` goes on giving Grassmann heads of the same kind (and none for num_classes=0),
    and `no_weight_decay` names their weights, so that timm's own parameter groups do not decay them.

    Raises ValueError when there is no linear classifier, or subspace_dim exceeds its width.
    """

    def make(in_features: int, classes: int, **dd: Any) -> nn.Module:
        # Bases in half precision would not be orthonormal.
        dtype = dd["dtype"] if dd["dtype"] in (torch.float32, torch.float64) else torch.float32
        return GrassmannHead(in_features, classes, subspace_dim, scale, backend=backend, **{**dd, "dtype": dtype})

    again = partial(put_grassmann_head, subspace_dim=subspace_dim, scale=scale, backend=backend)
    return _put(model, num_classes, make, again)


def put_cosine_head(model: nn.Module, num_classes: int | None = None, scale: float = 25.0) -> nn.Module:
    """Replace the classifier of `model` by a `CosineHead`, in the same way as `put_grassmann_head`."""
    return _put(model, num_classes, partial(CosineHead, scale=scale), partial(put_cosine_head, scale=scale))


def classifier_names(model: nn.Module) -> list[str]:
    """Dotted names of the classifiers of `model`. ValueError if it has none that is linear."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    named = config.get("classifier") or ()
    named = [named] if isinstance(named, str) else list(named)
    found = [name for name in named if _is_classifier(_find(model, name))]
    if not found:
        found = [name for name, module in model.named_modules() if name and _is_classifier(module)][-1:]
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no linear classifier to replace (num_classes=0, or a convolutional one)"
        )
    return found


def _put(model: nn.Module, num_classes: int | None, make: Callable[..., nn.Module], again: Any) -> nn.Module:
    """Replace every classifier by `make(in_features, num_classes, device=…, dtype=…)`, and by `again` after a reset."""
    names = classifier_names(model)
    for name in names:
        old: Any = model.get_submodule(name)
        before = old.num_classes if isinstance(old, GrassmannHead) else old.out_features
        classes = before if num_classes is None else num_classes
        head = make(old.in_features, classes, device=old.weight.device, dtype=old.weight.dtype)
        head.train(old.training)
        _replace(model, name, head)
    if num_classes is not None and hasattr(model, "num_classes"):
        model.__dict__["num_classes"] = num_classes
    _remember(model, names, again)
    return model


def _is_classifier(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | GrassmannHead | CosineHead)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace(model: nn.Module, name: str, head: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, head)


def _remember(model: Any, names: list[str], again: Callable[..., nn.Module]) -> None:
    """Shadow the methods; the class stays as it is. A bound method would be pickled as an attribute of the model."""
    model._head_names, model._put_head = names, again
    model.forward = partial(_forward, model)
    if callable(getattr(model, "reset_classifier", None)):
        model.reset_classifier = partial(_reset_classifier, model)
    model.no_weight_decay = partial(_no_weight_decay, model)


def _forward(
    model: Any, *args: Any, labels: Tensor | None = None, label_smoothing: float = 0.0, **keywords: Any
) -> Any:
    """The class's own `forward`; with labels, the loss of what it hands to the head."""
    forward = type(model).forward
    if labels is None:
        return forward(model, *args, **keywords)
    if not model._head_names:
        raise ValueError(f"labels: {type(model).__name__} has no head to compute a loss with")
    if len(model._head_names) > 1:
        logits = forward(model, *args, **keywords)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    head = model.get_submodule(model._head_names[0])
    head.features_only = True
    try:
        features = forward(model, *args, **keywords)
    finally:
        head.features_only = False
    if not isinstance(features, Tensor):
        raise ValueError(
            f"labels: {type(model).__name__} gives {type(features).__name__} in training, which has no one loss: leave "
            "labels out and compute it from what the model gives"
        )
    return head.loss(features, labels, label_smoothing=label_smoothing)


def _reset_classifier(model: Any, num_classes: int, *args: Any, **keywords: Any) -> None:
    """The class's own `reset_classifier`, then a new head of the same kind."""
    type(model).reset_classifier(model, num_classes, *args, **keywords)
    model._head_names = []
    if num_classes > 0:
        model._put_head(model)


def _no_weight_decay(model: Any) -> set[str]:
    """The class's own names and the weights of the Grassmann heads."""
    inherited = getattr(type(model), "no_weight_decay", None)
    heads = {id(head.weight) for head in grassmann_heads(model)}
    return set(inherited(model) if inherited else ()) | {n for n, p in model.named_parameters() if id(p) in heads}
