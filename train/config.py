"""What it takes to run a training: frozen dataclasses that the command line reads and a checkpoint keeps."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_type_hints

from typing_extensions import Self

from ..archs.hints import described, fits

# What a resumed run may change without changing the numbers of the steps already made.
RESUMABLE = frozenset(
    {"steps", "epochs", "eval_every", "save_every", "eval_epochs", "log_every"}
    | {"out", "resume", "tensorboard", "samples", "workers", "on_nan", "bad_images", "parallel"}
)
# Lengths in steps, with the setting that has them in epochs: one that is given takes the place of the other.
EPOCHS = {"steps": "epochs", "warmup": "warmup_epochs", "eval_every": "eval_epochs"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that every task shares.

    Raises ValueError that names the setting, its value and what is allowed.
    """

    model: str
    """A preset of `grassland.archs.list_models()` or an assembly kind ("lm", "mlm" or "vision")."""
    data: str
    """Where the data comes from: a name, a file or a folder."""
    set: tuple[str, ...] = ()
    """Overrides of the model: `--set dim=128 depth=2 mixer=attention offsets=1,2,4`; several --set add up."""
    out: str | None = None
    """Folder of the run; by default a fresh one, runs/MODEL-DATA."""
    resume: str | None = None
    """Folder of an interrupted run to continue, with its own settings; auto continues --out if there is one."""
    steps: int | None = None
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the training data; counts in place of --steps."""
    batch_size: int = 32
    """Sequences (or images) in a micro-batch, over all processes together."""
    grad_accum: int = 1
    """Micro-batches in an optimiser step."""
    optimizer: Literal["adamw", "lamb", "muon", "sgd"] = "adamw"
    """Muon takes the hidden matrices and leaves the rest to AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "step", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """Warm-up in passes over the training data; counts in place of --warmup."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Fractions of the steps at which the step schedule falls to a tenth."""
    decay: float = 0.2
    """Last fraction of the steps over which wsd decays."""
    floor: float = 0.1
    """Where the schedule ends, as a fraction of the peak."""
    weight_decay: float = 0.01
    """Decay of weight matrices, decoupled except for SGD, where it is part of the gradient, and LAMB, whose trust ratio
    sees it; norms, biases and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moments; the first one is also the momentum of SGD."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    dtype: Literal["bf16", "float32"] = "float32"
    """Precision of autocast; weights and optimiser state stay float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    parallel: Literal["none", "ddp", "fsdp"] | None = None
    """How processes share a model: ddp replicates it, fsdp shards it; by default ddp under torchrun."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or leave out the step; ten in a row end it."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = False
    """Record forward, backward and AdamW's step once and replay them, so that launches cost nothing: train lm, on one
    GPU."""
    seed: int = 0
    """Seeds initial weights, data order, dropout and samples."""
    eval_every: int = 200
    """Steps between validations; 0 validates only at the end."""
    valid_batches: int | None = None
    """Batches that a validation judges, the first ones of the split; by default all. Testing always sees all."""
    save_every: int | None = None
    """Steps between resumable checkpoints, by default 200; 0 saves only at the end and on a signal."""
    eval_epochs: float | None = None
    """Passes between validations; counts in place of --eval-every, and for checkpoints if --save-every is not given."""
    log_every: int = 10
    """Steps between lines of the log."""
    samples: int = 2
    """Samples drawn at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if not fits(getattr(self, name), hint):
                raise ValueError(f"{name} must be {described(hint)}, got {getattr(self, name)!r}")
            if not _is_finite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs")
        for name in ("steps", "epochs", "batch_size", "grad_accum", "log_every", "valid_batches"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        limits = ("lr", "warmup", "warmup_epochs", "weight_decay", "clip")
        for name in (*limits, "eval_every", "save_every", "eval_epochs", "samples", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be less than 2^64, got {self.seed}")
        for name in ("decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ValueError(f"milestones must lie in [0, 1], got {self.milestones}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `json.dumps` takes. What a run was resumed from, and by whom, is no part of what it is."""
        return {**asdict(self), "resume": None, "parallel": None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; lists become tuples again. ValueError for an unknown setting."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)} in the run's config")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)

    def overrides(self) -> dict[str, Any]:
        """The parsed `--set` arguments. ValueError for a setting of the run's that is none of the model's."""
        given = dict(map(parse_setting, self.set))
        for name in ("device", "dtype"):
            if name in given:
                raise ValueError(f"set {name}={given[name]}: it is no option of a model, give --{name}")
        return given

    def changed(self, other: "RunConfig") -> list[str]:
        """The settings, other than those a resumed run may change, in which `other` differs."""
        ours, theirs = self.to_dict(), other.to_dict()
        return [name for name in ours if name not in RESUMABLE and ours[name] != theirs.get(name)]


@dataclass(frozen=True, kw_only=True)
class LMConfig(RunConfig):
    """A causal language model on text.

    Without --model: a small Grassmann LM on the embedded corpus, one to two minutes on two CPU cores.
    """

    model: str = "grassmann_lm_6l"
    """A preset of `grassland.archs.list_models()`, the assembly "lm", or an architecture of transformers': hf/TYPE."""
    data: str = "pydoc"
    """pydoc (embedded), a text or parquet file, a folder with train/valid/test files, or a hub name[:config]."""
    tokenizer: str = "bpe:4096"
    """bpe:SIZE trains a byte-level BPE; or a vocab.txt, a tokenizer.json, a folder with one, or a hub name."""
    seq_len: int = 128
    """Tokens in a block."""
    lr: float = 3e-4
    """Peak learning rate."""
    text_column: str = "text"
    """Column of a parquet file or hub data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len <= 0:
            raise ValueError(f"seq_len must be positive, got {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(RunConfig):
    """An image classifier: a model of timm's or of grassland's own.

    Without --model and --recipe: a small ResNet on the embedded digits, less than a minute on two CPU cores.
    """

    model: str = "timm/resnet10t"
    """A vision preset of `grassland.archs.list_models()`, or a model of timm's: timm/NAME."""
    data: str = "digits"
    """digits (embedded), a folder of class folders (or of train/valid/test with them), parquet, or a hub name."""
    recipe: str | None = None
    """A paper's settings to start from (r50, r50d, r101d, swin_t, rsb_a1, widenet …); other options count over them."""
    image_column: str | None = None
    """Column of a parquet file or hub data set; by default image, or the only one of its like."""
    label_column: str | None = None
    """Column of a parquet file or hub data set; by default label, or the only one of its like."""
    head: Literal["linear", "cosine", "grassmann"] = "linear"
    """The classifier: linear leaves the model's own; cosine normalises it; grassmann makes each class a subspace."""
    subspace_dim: int = 8
    """Dimension k of a Grassmann head's class subspaces."""
    head_lr: float | None = None
    """Peak learning rate of a Grassmann head; by default that of the body."""
    head_dropout: bool = True
    """Keep the dropout between features and classifier, if a timm model has one."""
    lr: float = 1e-3
    """Peak learning rate."""
    floor: float = 0.0
    """Where the schedule ends, as a fraction of the peak."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    loss: Literal["ce", "bce"] = "ce"
    """Softmax cross entropy, or binary cross entropy summed over the classes."""
    bce_threshold: float | None = None
    """With --loss bce: targets above it count as 1, the others as 0; by default they count as they are."""
    img_size: int = 224
    """Side of the square that the model sees."""
    eval_size: int | None = None
    """That side in evaluation, for models that take any; by default the same."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the channels (0 … 1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What the channels are divided by."""
    crop: Literal["resized", "padded"] = "resized"
    """Training crop: of random area and aspect, then resized; or of full size from an image padded by an eighth."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a resized crop's area, as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a resized crop's aspect ratio."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """How images are resized; random is for training, with bicubic in evaluation."""
    crop_pct: float = 0.875
    """Share of the resized image's side that the centre crop of evaluation keeps."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; without effect beside --auto-augment, 3a excepted."""
    auto_augment: str | None = None
    """A policy as timm writes it: rand-m9-mstd0.5-inc1, augmix-m3-w3, original …"""
    erase: float = 0.0
    """Probability of random erasing."""
    repeats: int = 1
    """Repeated augmentation: how often an image comes in a row, each time augmented anew; an epoch keeps its length."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is none."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes evenly."""
    ema: float = 0.0
    """Decay of the averaged weights that are then judged and saved; 0 is none."""
    channels_last: bool = False
    """Keep images and weights in channels-last order."""
    workers: int = 0
    """Processes that prepare batches; the batches are the same for any number."""
    bad_images: Literal["error", "skip"] = "error"
    """What an unreadable or truncated image is: an error that names it, or left out and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("subspace_dim", "img_size", "eval_size", "repeats", "crop_pct"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("mixup", "cutmix", "color_jitter", "workers", "head_lr"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("hflip", "erase", "mix_prob", "switch_prob", "label_smoothing", "crop_pct"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be two positive numbers, the smaller one first, got {getattr(self, name)}"
                )
        if self.scale[1] > 1:
            raise ValueError(f"scale must lie in (0, 1], got {self.scale}")
        if not all(0 <= level <= 1 for level in self.mean):
            raise ValueError(f"mean must lie in [0, 1], got {self.mean}")
        if not all(deviation > 0 for deviation in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.bce_threshold is not None and not 0 <= self.bce_threshold < 1:
            raise ValueError(f"bce_threshold must lie in [0, 1), got {self.bce_threshold}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")
        if self.loss == "bce" and self.head == "grassmann":
            raise ValueError("loss 'bce' cannot train a Grassmann head: its logits are never negative")
        if self.head_lr is not None and self.head != "grassmann":
            raise ValueError(f"head_lr is for a Grassmann head, got {self.head_lr} with head {self.head!r}")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def named_lm() -> LMConfig:
    """A model that the user names: as its preset says, with AdamW at a rate that post-norm models bear."""
    return LMConfig(steps=1000)


def default_lm() -> LMConfig:
    """A small Grassmann LM on the embedded corpus: one to two minutes on two CPU cores."""
    return LMConfig(
        set=("dim=128", "ffn_dim=512", "norm=pre", "dropout=0.1"),
        optimizer="muon",
        lr=5e-3,
        batch_size=8,
        steps=400,
        warmup=40,
        eval_every=100,
        save_every=100,
    )


def parse_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE as the name and a number, bool, None, word or tuple; ValueError without a name or "="."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    return name, _value(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return tuple(map(_value, text.strip(",").split(","))) if "," in text else _word(text)
    return tuple(value) if isinstance(value, list) else value


def _word(text: str) -> Any:
    return {"True": True, "False": False, "None": None}.get(text, text)
