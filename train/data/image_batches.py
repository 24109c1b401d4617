"""Batches of images: augmentation, mixing, and worker processes that change none of it.

All that is random in a batch follows from the seed and the place in the stream, so a position is all that a
checkpoint needs, and any number of workers makes the same batches.
"""

import importlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...kernels.losses import IGNORE
from ..config import VisionConfig
from ..optional import optional
from ..parallel import rank, rows, size
from .blocks import BlockOrder
from .errors import WorkerError, is_obituary, obituary
from .images import ImageError, ImageSet

Transform = Callable[[Any], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageBatch(NamedTuple):
    """images (B, 3, S, S) float32; targets: classes (B,) int64, or shares (B, K) float32 of a mixed batch.

    skipped: how many images could not be read.
    """

    images: Tensor
    targets: Tensor
    skipped: int


class TrainBatches(Dataset):
    """The endless stream of augmented training batches; item `position` is the same whenever it is asked.

    A process gets its rows: some of the first half, and of the second those that mixing pairs with them.
    """

    def __init__(self, images: ImageSet, classes: int, config: VisionConfig) -> None:
        self.images, self.config = images, config
        self.order = BlockOrder(len(images), config.seed)
        self.rows = _mirrored_rows(config.batch_size)
        if config.mixes and len(self.rows) % 2:
            # Those that are mixed with each other must be in one process.
            wanted = f"a multiple of twice the {size()} processes for mixup and cutmix"
            raise ValueError(f"batch_size must be {wanted}, got {config.batch_size}")
        self.transform = train_transform(config)
        self.mix = mixing(config, classes) if config.mixes else None

    def __getitem__(self, position: int) -> ImageBatch | ImageError:
        count, repeats = self.config.batch_size, self.config.repeats
        draws = range(position * count, (position + 1) * count)
        first = draws[0] // repeats
        indices = self.order.at(first, draws[-1] // repeats - first + 1)
        with _generators_kept():
            try:
                drawn = [self._draw(int(indices[draws[row] // repeats - first]), draws[row]) for row in self.rows]
            except ImageError as error:
                # As a value: an exception that crosses processes comes with a traceback in its message.
                return error
            images, targets = _stack(drawn)
            if self.mix is not None:
                _seed_generators(self.config.seed, position, 1)
                images, targets = self.mix(images, targets)
        return ImageBatch(images, targets, sum(skipped for _, _, skipped in drawn))

    def _draw(self, index: int, draw: int) -> tuple[Tensor, int, int]:
        """The augmented image, its label, and how many unreadable ones it stands for."""
        for skipped in range(len(self.images)):
            chosen = (index + skipped) % len(self.images)
            try:
                image = self.images.open(chosen)
            except ImageError:
                if self.config.bad_images == "error":
                    raise
                continue
            _seed_generators(self.config.seed, draw)
            return self.transform(image), int(self.images.labels[chosen]), skipped
        raise ImageError(f"not one of {len(self.images)} images can be read, {self.images.name(0)} among them")


class EvalBatches(Dataset):
    """Every image of a split once, cropped from the centre.

    All batches have one shape, so that compiled models see no other: what is missing in the last one, and where
    unreadable images are skipped, has the target −100. A process gets its rows of each.
    """

    def __init__(self, images: ImageSet, config: VisionConfig) -> None:
        self.images, self.config = images, config
        self.transform = eval_transform(config)
        self.rows = range(config.batch_size)[rows(config.batch_size)]

    def __len__(self) -> int:
        return -(-len(self.images) // self.config.batch_size)

    def __getitem__(self, number: int) -> ImageBatch | ImageError:
        first, count, side = number * self.config.batch_size, len(self.rows), _eval_side(self.config)
        images, targets = torch.zeros(count, 3, side, side), torch.full((count,), IGNORE)
        skipped = 0
        for row, index in enumerate(first + place for place in self.rows):
            if index >= len(self.images):
                break
            try:
                images[row] = self.transform(self.images.open(index))
                targets[row] = int(self.images.labels[index])
            except ImageError as error:
                if self.config.bad_images == "error":
                    return error
                skipped += 1
        return ImageBatch(images, targets, skipped)


def load_batches(batches: Dataset, positions: Iterable[int], workers: int) -> Iterator[ImageBatch]:
    """The items at `positions`, in their order, made by so many processes (0: by this one).

    Raises ImageError, and WorkerError if one of these processes dies.
    """
    loader = DataLoader(
        batches,
        sampler=positions,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupts,
        # Its own: the global generator must not notice a loader.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, ImageError):
                raise ImageError(f"{batch}; --bad-images skip leaves such images out")
            yield batch
    except RuntimeError as error:
        if not is_obituary(error):
            raise
        raise WorkerError.of(error) from error
    except (ConnectionError, EOFError) as error:
        # One that died while it handed over a batch.
        raise WorkerError.of(obituary() or error) from error


def _mirrored_rows(count: int) -> list[int]:
    """This process's rows of a training batch. Mixing pairs row i with row count − 1 − i, which is here, too, and the
    pairs of all processes are those of one."""
    each = count // size()
    front, back = each - each // 2, each // 2
    first, last = rank() * front, count - rank() * back
    return [*range(first, first + front), *range(last - back, last)]


def train_transform(config: VisionConfig) -> Transform:
    """timm's training transform for these settings. ValueError for an unknown augmentation policy."""
    side = config.img_size
    try:
        stages = optional("timm.data", "vision").create_transform(
            side,
            is_training=True,
            separate=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=config.erase,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment {config.auto_augment!r} is not a policy of timm's ({error})") from error
    transforms: Any = importlib.import_module("torchvision.transforms")
    if config.crop == "padded":
        stages = (transforms.Compose(_padded_crop(config, transforms)), *stages[1:])
    return transforms.Compose([step for stage in stages for step in stage.transforms])


def eval_transform(config: VisionConfig) -> Transform:
    """timm's evaluation transform for these settings."""
    interpolation = "bicubic" if config.interpolation == "random" else config.interpolation
    return optional("timm.data", "vision").create_transform(
        _eval_side(config), crop_pct=config.crop_pct, interpolation=interpolation, mean=config.mean, std=config.std
    )


def _eval_side(config: VisionConfig) -> int:
    return config.img_size if config.eval_size is None else config.eval_size


def mixing(config: VisionConfig, classes: int) -> Mix:
    """timm's mixup and cutmix; label smoothing is part of the mixed targets."""
    return optional("timm.data", "vision").Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )


def _padded_crop(config: VisionConfig, transforms: Any) -> list[Any]:
    side = config.img_size
    modes = {"bilinear": transforms.InterpolationMode.BILINEAR}
    resize = transforms.Resize((side, side), modes.get(config.interpolation, transforms.InterpolationMode.BICUBIC))
    return [resize, transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip(config.hflip)]


def _stack(rows: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _, _ in rows]), torch.tensor([label for _, label, _ in rows])


@contextmanager
def _generators_kept() -> Iterator[None]:
    """timm and torchvision draw from the global generators; afterwards these are as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def _seed_generators(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    # Not torch.manual_seed: that would seed the GPUs as well.
    torch.default_generator.manual_seed(int(words[2]))


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C goes to every process of a terminal; the training one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
