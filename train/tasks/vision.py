"""Image classification."""

import importlib
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...archs.heads import grassmann_heads
from ...archs.modes import evaluating
from ..classify import evaluate_classifier
from ..config import RunConfig, VisionConfig
from ..data.image_batches import EvalBatches, ImageBatch, TrainBatches, load_batches
from ..data.image_sources import load_images
from ..ema import WeightAverage
from ..flops import flop_counter
from ..parallel import gather, is_main
from ..vision_model import ImageModelSpec, build_vision_model, load_vision_model, num_parameters, save_vision_model
from .base import Task


class ImageClassification(Task):
    """A class for each image. With `config.ema` the averaged weights are judged and saved.

    Raises what `load_images` and `build_vision_model` raise, and ValueError for an unknown augmentation policy.
    """

    name, unit, metric = "vision", "images", "error"

    def __init__(self, config: VisionConfig, device: torch.device) -> None:
        self.config = config
        self.data = load_images(config.data, config.image_column, config.label_column)
        self.train_batches = TrainBatches(self.data.splits["train"], len(self.data.classes), config)
        model = build_vision_model(_spec(config, len(self.data.classes)), config.eval_size)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(model, device)
        self.average = WeightAverage(self.model, config.ema) if config.ema else None
        self.skipped = 0

    @property
    def batches_per_epoch(self) -> float:
        return len(self.data.splits["train"]) / self.config.batch_size

    @cached_property
    def flops_per_unit(self) -> float:
        own: Any = getattr(self.model, "flops_per_image", None)
        if own is not None:
            return float(own(training=True))
        image = torch.zeros(1, 3, self.config.img_size, self.config.img_size, device=self.device)
        with evaluating(self.model), flop_counter() as counter, torch.no_grad():
            self.model(self._images(image))
        # The counter does not see into grassland's own operators.
        heads = sum(head.flops_per_token() for head in grassmann_heads(self.model))
        return 3.0 * (counter.get_total_flops() + heads)

    def models(self) -> list[nn.Module]:
        return [self.model, *(self.average.models() if self.average else ())]

    @cached_property
    def binary_loss(self) -> Any:
        """Binary cross entropy, the mean over the images of the sum over the classes.

        mmpretrain, with which arXiv 2308.01547 trained, has this sum; timm's default is the mean over the classes, too.
        """
        timm_loss: Any = importlib.import_module("timm.loss")
        smoothing, threshold = self.config.label_smoothing, self.config.bce_threshold
        return timm_loss.BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=True)

    @property
    def eval_model(self) -> nn.Module:
        return self.model if self.average is None else self.average.judged()

    def batches(self, position: int) -> Iterator[ImageBatch]:
        yield from load_batches(self.train_batches, itertools.count(position), self.config.workers)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.skipped += batch.skipped
        images, targets = self._images(batch.images), self.to_device(batch.targets)
        timms = hasattr(self.model, "spec")
        # grassland's own models add losses of their own, as the balance of experts.
        if self.config.loss == "bce":
            if timms:
                return self.binary_loss(model(images).float(), targets)
            return model(images, labels=targets, criterion=self.binary_loss)
        # Mixed targets are smoothed already.
        smoothing = 0.0 if targets.ndim > 1 else self.config.label_smoothing
        if self.config.head == "linear" and timms:
            return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)
        # A Grassmann head writes no logits.
        return model(images, labels=targets, label_smoothing=smoothing)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        batches = EvalBatches(self.data.splits[split], self.config)
        stream = load_batches(batches, list(self.judged(range(len(batches)), split)), self.config.workers)
        return evaluate_classifier(model, stream, self._images, self.device)

    def save(self, folder: Path, config: RunConfig) -> None:
        extra = {"task": self.name, "classes": self.data.classes, "run": config.to_dict()}
        save_vision_model(self.eval_model, folder, extra)

    def best_model(self, folder: Path) -> nn.Module:
        return load_vision_model(folder, self.device)

    def identity(self) -> dict[str, Any]:
        return {"data": self.data.key, "classes": len(self.data.classes)}

    def describe(self) -> dict[str, Any]:
        counts = {name: len(part) for name, part in self.data.splits.items()}
        facts = {"data": self.data.name, "key": self.data.key, "classes": len(self.data.classes), "splits": counts}
        return {**facts, "tested_on": self.data.tested_on, "parameters": num_parameters(self.model)}

    def optimizer_options(self) -> dict[str, Any]:
        return {} if self.config.head_lr is None else {"head_lr": self.config.head_lr}

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.model)

    def train_metrics(self) -> dict[str, Any]:
        skipped, self.skipped = sum(gather(self.skipped)), 0
        return {"skipped": skipped} if self.config.bad_images == "skip" else {}

    def state(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {"skipped": sum(gather(self.skipped)), **average}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"] if is_main() else 0
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _images(self, images: Tensor) -> Tensor:
        images = self.to_device(images)
        return images.to(memory_format=torch.channels_last) if self.config.channels_last else images


def _spec(config: VisionConfig, classes: int) -> ImageModelSpec:
    return ImageModelSpec(
        name=config.model,
        num_classes=classes,
        img_size=config.img_size,
        head=config.head,
        subspace_dim=config.subspace_dim,
        head_dropout=config.head_dropout,
        options=config.overrides(),
    )
