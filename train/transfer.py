"""How well a trained model's features serve another task: a linear classifier on them, by scikit-learn."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..archs import CheckpointError, read_config
from ..kernels.losses import IGNORE
from .config import VisionConfig
from .data.image_batches import EvalBatches, load_batches
from .data.image_sources import ImageData, load_images
from .data.images import ImageSet
from .optional import optional
from .vision_model import image_features, load_vision_model

RESULTS_FILE = "transfer.jsonl"
Features = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class TransferOptions:
    """Linear classification of other images by the features of a trained model."""

    folder: Path
    """Folder of the run whose model is judged."""
    data: str = "digits"
    """digits, a folder of class folders (or of train/valid/test with them), parquet, or a hub name."""
    classifier: Literal["logistic", "svm"] = "logistic"
    """Logistic regression, or a linear support vector machine."""
    c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Inverse strengths of the regularisation; validation picks one."""
    batch_size: int = 64
    """Images in a batch."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    workers: int = 0
    """Processes that prepare batches."""
    bad_images: Literal["error", "skip"] = "error"
    """What an unreadable or truncated image is: an error that names it, or left out."""
    image_column: str | None = None
    """Column of a parquet file or hub data set; by default image, or the only one of its like."""
    label_column: str | None = None
    """Column of a parquet file or hub data set; by default label, or the only one of its like."""


def transfer(options: TransferOptions, device: torch.device) -> dict[str, Any]:
    """Fit on the training split for each C, choose C on validation, judge on test; top-1 accuracies.

    Features are standardised by the training split's mean and deviation. The result is also appended to the folder's
    transfer.jsonl. Raises CheckpointError for a folder without an image model, and what `load_images` raises.
    """
    if not options.c or not all(0 < c < math.inf for c in options.c):
        raise ValueError(f"c must be one positive, finite number or more, got {options.c}")
    config = _settings(options)
    data = load_images(options.data, options.image_column, options.label_column)
    model = load_vision_model(options.folder, device)
    train, valid, test = _all_features(model, data, config, device)
    fitted = {c: _classifier(options.classifier, c).fit(*train) for c in options.c}
    scores = {c: float(machine.score(*valid)) for c, machine in fitted.items()}
    best = max(scores, key=lambda c: scores[c])
    result = {
        "data": data.name,
        "classes": len(data.classes),
        "images": {
            name: len(part[1]) for name, part in zip(("train", "valid", "test"), (train, valid, test), strict=True)
        },
        "features": train[0].shape[1],
        "classifier": options.classifier,
        "c": best,
        "valid_top1": scores[best],
        "test_top1": float(fitted[best].score(*test)),
        "tested_on": data.tested_on,
    }
    with (options.folder / RESULTS_FILE).open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def _settings(options: TransferOptions) -> VisionConfig:
    """How the model has seen images in its own training, batched as the options say."""
    content = read_config(options.folder)
    if content.get("task") != "vision" or not isinstance(content.get("run"), dict):
        raise CheckpointError(f"{options.folder}: no run of an image model, nothing to transfer")
    try:
        config = VisionConfig.from_dict({**content["run"], "batch_size": 2})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{options.folder / 'config.json'}: {error}") from error
    return replace(
        config,
        batch_size=options.batch_size,
        mixup=0.0,
        cutmix=0.0,
        bad_images=options.bad_images,
        workers=options.workers,
    )


def _all_features(
    model: torch.nn.Module, data: ImageData, config: VisionConfig, device: torch.device
) -> tuple[Features, Features, Features]:
    names = ("train", "valid", "test")
    found: dict[int, Features] = {}
    for part in (data.splits[name] for name in names):
        if id(part) not in found:
            found[id(part)] = features(model, part, config, device)
    for name in names:
        if not len(found[id(data.splits[name])][1]):
            raise ValueError(f"data {data.name}: there is no readable image in the {name} split")
    train, valid, test = (found[id(data.splits[name])] for name in names)
    if len(np.unique(train[1])) < 2:
        raise ValueError(f"data {data.name}: a classifier needs images of two classes or more")
    return train, valid, test


@torch.no_grad()
def features(model: torch.nn.Module, images: ImageSet, config: VisionConfig, device: torch.device) -> Features:
    """The features (N, n) and labels (N,) of a split's readable images."""
    batches = EvalBatches(images, config)
    rows, labels = [], []
    for batch in load_batches(batches, range(len(batches)), config.workers):
        counted = batch.targets != IGNORE
        found = image_features(model, batch.images.to(device)).flatten(1).float().cpu()
        rows.append(found[counted].numpy())
        labels.append(batch.targets[counted].numpy())
    return np.concatenate(rows), np.concatenate(labels)


def _classifier(kind: str, c: float) -> Any:
    linear, svm, pipeline, preprocessing = (
        optional(f"sklearn.{part}", "vision", "scikit-learn")
        for part in ("linear_model", "svm", "pipeline", "preprocessing")
    )
    machines: dict[str, Callable[[], Any]] = {
        "logistic": lambda: linear.LogisticRegression(C=c, max_iter=1000),
        "svm": lambda: svm.LinearSVC(C=c, max_iter=5000, dual="auto", random_state=0),
    }
    return pipeline.make_pipeline(preprocessing.StandardScaler(), machines[kind]())
