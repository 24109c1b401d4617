"""Image models by name, timm's and grassland's own: build, save, load, and their features."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import (
    create_model,
    list_models,
    load_model,
    model_config,
    read_config,
    save_model,
)
from ..archs.modes import evaluating
from ..archs.registry import unknown
from .foreign import load_foreign, save_foreign
from .optional import optional

TIMM = "timm/"


@dataclass(frozen=True)
class ImageModelSpec:
    """What it takes to build an image model. options: keywords of `timm.create_model` or of `archs.create_model`."""

    name: str
    num_classes: int
    img_size: int
    head: str = "linear"
    subspace_dim: int = 8
    head_dropout: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def build_vision_model(spec: ImageModelSpec, eval_size: int | None = None) -> nn.Module:
    """The model that `spec.name` names: a vision preset of grassland's, timm/NAME, or a name that timm knows.

    Raises ValueError for an unknown name, for a model that is none for images, and if it doesn't take images of this
    size, or of `eval_size` beside it.
    """
    name = spec.name.removeprefix(TIMM)
    if spec.name in list_models() or spec.name == "vision":
        model = _own_model(spec)
    elif optional("timm", "vision").is_model(name):
        model = _timm_model(replace(spec, name=name))
    else:
        raise unknown("model", spec.name, _known_names(spec.name))
    for side in {spec.img_size, eval_size or spec.img_size}:
        _try_out(model, spec, side)
    return model


def save_vision_model(model: nn.Module, folder: Path, extra: Mapping[str, Any]) -> None:
    """`archs.save_model` for models of timm's, too."""
    spec = getattr(model, "spec", None)
    if spec is None:
        save_model(model, folder, extra=extra)
        return
    save_foreign(folder, {"kind": "timm", **asdict(spec)}, model.state_dict(), extra)


def load_vision_model(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save_vision_model` wrote, in evaluation mode. Raises CheckpointError that names the file."""
    values = dict(read_config(folder)["model"])
    if values.pop("kind", None) != "timm":
        return load_model(folder, device=device)

    def build() -> nn.Module:
        options = {key: _tuples(value) for key, value in values.pop("options", {}).items()}
        options.pop("pretrained", None)  # the weights come from the checkpoint
        return _timm_model(ImageModelSpec(**values, options=options))

    return load_foreign(folder, build, device)


def image_features(model: Any, images: Tensor) -> Tensor:
    """What the classifier sees, (B, n). ValueError for a model that doesn't tell."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    if callable(getattr(model, "features", None)):
        found = model.features(images)
        # grassland's models give the auxiliary losses of their layers along.
        return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"{type(model).__name__} has no features to transfer: neither forward_head nor features")


def num_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _timm_model(spec: ImageModelSpec) -> nn.Module:
    """The model of timm's that `spec.name` names without its prefix, with fresh weights."""
    timm = optional("timm", "vision")
    options: dict[str, Any] = dict(spec.options)
    if timm.get_pretrained_cfg(spec.name).fixed_input_size:
        options["img_size"] = spec.img_size
    try:
        model: Any = timm.create_model(spec.name, num_classes=spec.num_classes, **options)
    except Exception as error:  # whatever a model raises for sizes that do not fit
        settings = ", ".join(f"{name}={value!r}" for name, value in options.items())
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model {TIMM}{spec.name} cannot be built with {settings or 'its own settings'}: {reason}"
        ) from error
    if not spec.head_dropout:
        _drop_head_dropout(model)
    if spec.head != "linear":
        model = _put_head(model, spec)
    model.spec = spec
    return model


def _own_model(spec: ImageModelSpec) -> Any:
    kind = model_config(spec.name).kind
    if kind != "vision":
        raise ValueError(f"model {spec.name!r} is of kind {kind!r}, not for images")
    head: dict[str, Any] = {} if spec.head == "linear" else {"head": spec.head}
    if spec.head == "grassmann":
        head["subspace_dim"] = spec.subspace_dim
    sizes = {"num_classes": spec.num_classes, "image_size": spec.img_size}
    return create_model(spec.name, **{**sizes, **head, **spec.options})


def _put_head(model: Any, spec: ImageModelSpec) -> Any:
    interop: Any = importlib.import_module("...archs.interop.timm", __name__)
    if spec.head == "cosine":
        return interop.put_cosine_head(model)
    return interop.put_grassmann_head(model, subspace_dim=spec.subspace_dim)


def _try_out(model: Any, spec: ImageModelSpec, side: int) -> None:
    """One black image through the model: whether it takes this size shows before anything is written."""
    size = (1, 3, side, side)
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(torch.zeros(size))
    except Exception as error:
        raise ValueError(f"model {spec.name} does not take images of {size[2]}×{size[3]}: {error}") from error
    if logits.shape != (1, spec.num_classes):
        raise ValueError(f"model {spec.name} gives {tuple(logits.shape)}, not logits (1, {spec.num_classes})")


def _drop_head_dropout(model: Any) -> None:
    """timm keeps it in a rate that the forward reads, in a module beside the classifier, or in the head's module."""
    model.drop_rate = 0.0
    for owner in (model, getattr(model, "head", None)):
        for name in ("drop", "head_drop"):
            if isinstance(getattr(owner, name, None), nn.Dropout):
                setattr(owner, name, nn.Identity())


def _known_names(name: str) -> list[str]:
    own = [preset for preset in list_models() if model_config(preset).kind == "vision"]
    prefix = TIMM if name.startswith(TIMM) else ""
    return own + [prefix + known for known in optional("timm", "vision").list_models()]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
