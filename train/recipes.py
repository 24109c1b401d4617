"""Recipes of the papers for image models: functions that return the settings of a run.

Each takes the classifier: "grassmann" with subspaces of dimension k, or "linear" for the baseline.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..archs import list_models, model_config
from ..archs.registry import unknown
from .config import VisionConfig

IMAGENET = {"data": "imagenet-1k", "betas": (0.9, 0.999), "dtype": "bf16", "channels_last": True, "workers": 8}
Recipe = Callable[..., VisionConfig]


def default_vision() -> VisionConfig:
    """A small ResNet on the embedded digits: less than a minute on two CPU cores."""
    return VisionConfig(
        set=("channels=16,32,64,128", "stem_width=8"),
        img_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop="padded",
        crop_pct=1.0,
        hflip=0.0,
        batch_size=64,
        epochs=12,
        warmup=20,
        eval_epochs=3,
        lr=5e-3,
        weight_decay=0.05,
        label_smoothing=0.1,
        ema=0.99,
    )


def named_vision(model: str) -> VisionConfig:
    """A model that the user names, at its preset's image size: AdamW with plain crops and flips."""
    preset = model_config(model) if model in list_models() else None
    size = getattr(preset, "image_size", 224)
    return VisionConfig(model=model, img_size=size, epochs=10, eval_epochs=1, weight_decay=0.05, batch_size=64)


def r50(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-50, arXiv 2308.01547: steps at epochs 30, 60, 90."""
    return _sgd("timm/resnet50", head, k, schedule="step")


def r50d(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-50-D, arXiv 2308.01547."""
    return _sgd("timm/resnet50d", head, k)


def r101d(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-101-D, arXiv 2308.01547."""
    return _sgd("timm/resnet101d", head, k)


def r152d(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-152-D, arXiv 2308.01547."""
    return _sgd("timm/resnet152d", head, k)


def resnext50(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNeXt-50 32×4d, arXiv 2308.01547."""
    return _sgd("timm/resnext50_32x4d", head, k)


def vgg13_bn(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """VGG-13-BN, arXiv 2308.01547: steps at epochs 30, 60, 90; the Grassmann head goes without the last dropout."""
    config = _sgd("timm/vgg13_bn", head, k, schedule="step")
    return replace(config, set=("drop_rate=0.5",), head_dropout=head == "linear")


def swin_t(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """Swin-T, arXiv 2308.01547; augmentation, warm-up, clipping and the last rate, 1e-5, as in arXiv 2103.14030."""
    return _recipe(
        "timm/swin_tiny_patch4_window7_224",
        head,
        k,
        optimizer="adamw",
        lr=1e-3,
        head_lr=0.1,
        weight_decay=0.05,
        batch_size=1024,
        epochs=300,
        warmup_epochs=20.0,
        floor=0.01,
        clip=5.0,
        set=("drop_path_rate=0.2",),
        auto_augment="rand-m9-mstd0.5-inc1",
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
        label_smoothing=0.1,
        crop_pct=0.9,
    )


def deit3_s(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """DeiT3-S with cross entropy, arXiv 2308.01547; augmentation and warm-up as in arXiv 2204.07118."""
    return _recipe(
        "timm/deit3_small_patch16_224",
        head,
        k,
        optimizer="lamb",
        lr=4e-3,
        head_lr=0.3,
        weight_decay=0.05,
        batch_size=2048,
        epochs=800,
        warmup_epochs=5.0,
        clip=1.0,
        set=("drop_path_rate=0.05",),
        auto_augment="3a",
        color_jitter=0.3,
        mixup=0.8,
        cutmix=1.0,
        repeats=3,
        crop_pct=1.0,
    )


def rsb_a1(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-50-D with procedure A1 of arXiv 2110.00476, as in arXiv 2308.01547: 600 epochs."""
    more = {"auto_augment": "rand-m7-mstd0.5-inc1", "mixup": 0.2, "label_smoothing": 0.1, "repeats": 3}
    return _rsb(head, k, lr=0.005, weight_decay=0.01, epochs=600, set=("drop_path_rate=0.05",), **more)


def rsb_a2(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-50-D with procedure A2 of arXiv 2110.00476, as in arXiv 2308.01547: 300 epochs."""
    more = {"auto_augment": "rand-m7-mstd0.5-inc1", "mixup": 0.1, "repeats": 3}
    return _rsb(head, k, lr=0.005, weight_decay=0.02, epochs=300, set=("drop_path_rate=0.05",), **more)


def rsb_a3(head: str = "grassmann", k: int = 8) -> VisionConfig:
    """ResNet-50-D with procedure A3 of arXiv 2110.00476, as in arXiv 2308.01547: 100 epochs at 160, tested at 224."""
    more = {"auto_augment": "rand-m6-mstd0.5-inc1", "mixup": 0.1, "img_size": 160, "eval_size": 224}
    return _rsb(head, k, lr=0.008, weight_decay=0.02, epochs=100, **more)


def widenet(head: str = "linear", k: int = 8) -> VisionConfig:
    """WideNet-B/16 on ImageNet, arXiv 2107.11817; --model picks another size."""
    return _recipe(
        "widenet_b16",
        head,
        k,
        optimizer="lamb",
        lr=0.01,
        weight_decay=0.1,
        batch_size=4096,
        epochs=300,
        warmup_epochs=30.0,
        schedule="linear",
        clip=1.0,
        label_smoothing=0.1,
        mixup=0.5,
        auto_augment="rand-m15-mmax15-n2",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *(r50, r50d, r101d, r152d, resnext50, vgg13_bn),
        *(swin_t, deit3_s, rsb_a1, rsb_a2, rsb_a3, widenet),
    )
}


def recipe(name: str, **options: Any) -> VisionConfig:
    """The recipe of that name with `head` and `k` as given; ValueError with the nearest names if there is none."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return replace(RECIPES[name](**options), recipe=name)


def _recipe(model: str, head: str, k: int, **settings: Any) -> VisionConfig:
    if head != "grassmann":
        settings.pop("head_lr", None)
    everything = {**IMAGENET, "warmup": 0, "eval_epochs": 1.0, **settings}
    return VisionConfig(model=model, head=head, subspace_dim=k, **everything)  # type: ignore[arg-type]


def _sgd(model: str, head: str, k: int, schedule: str = "cosine") -> VisionConfig:
    """SGD with momentum .9, 100 epochs of batches of 256; the step schedule falls at 30, 60 and 90."""
    settings = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "batch_size": 256}
    return _recipe(model, head, k, **settings, epochs=100, schedule=schedule)


def _rsb(head: str, k: int, **settings: Any) -> VisionConfig:
    """LAMB, batches of 2048, mixup and cutmix; cross entropy for a Grassmann head, whose logits are no log-odds.

    The gradient's norm is at most 1, as timm's and mmpretrain's LAMB has it by default, and the rate ends at 1e-6.
    """
    loss = {"loss": "ce"} if head == "grassmann" else {"loss": "bce", "bce_threshold": 0.2}
    settings |= {"batch_size": 2048, "warmup_epochs": 5.0, "cutmix": 1.0, "crop_pct": 0.95, **loss}
    settings |= {"clip": 1.0, "floor": 1e-6 / settings["lr"]}
    return _recipe("timm/resnet50d", head, k, optimizer="lamb", head_lr=0.3, **settings)
