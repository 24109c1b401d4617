"""Every recipe has its paper's figures, typed here from the specification and from the papers it names."""

from dataclasses import fields

import pytest

from grassland.archs import GrassmannHead
from grassland.train.config import RunConfig, VisionConfig
from grassland.train.recipes import RECIPES, recipe
from grassland.train.tasks.finetune import RECIPES as FINETUNING
from grassland.train.tasks.finetune import finetune_settings
from grassland.train.tasks.mlm import RECIPES as MASKED
from grassland.train.tasks.mlm import mlm_settings
from grassland.train.tasks.qa import RECIPES as ANSWERING
from grassland.train.tasks.qa import qa_settings

# How a run goes, not what it computes; and where its data lies.
RUNNING = {"out", "resume", "device", "parallel", "on_nan", "compile", "cuda_graph", "seed", "save_every", "log_every"}
RUNNING |= {"samples", "tensorboard", "workers", "bad_images", "channels_last", "dtype", "valid_batches", "eval_every"}
RUNNING |= {"eval_epochs", "image_column", "label_column", "data", "recipe"}

# What is alike in all recipes, on ImageNet and otherwise.
COMMON = {"steps": None, "grad_accum": 1, "decay": 0.2, "milestones": (0.3, 0.6, 0.9), "betas": (0.9, 0.999)}
IMAGENET = {
    **COMMON, "head": "grassmann", "subspace_dim": 8, "head_lr": None, "head_dropout": True, "loss": "ce",
    "bce_threshold": None, "set": (), "schedule": "cosine", "warmup": 0, "warmup_epochs": None, "floor": 0.0,
    "clip": 0.0, "img_size": 224, "eval_size": None, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "crop": "resized", "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bicubic", "crop_pct": 0.875,
    "hflip": 0.5, "color_jitter": 0.0, "auto_augment": None, "erase": 0.0, "repeats": 1, "mixup": 0.0, "cutmix": 0.0,
    "mix_prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.0, "ema": 0.0,
}  # fmt: skip
# gcr.md: "SGD .9, batch 256, 100 epochs, lr .1 (cosine; step 30/60/90 for R50 and VGG), wd 1e-4".
SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "batch_size": 256, "epochs": 100}
STEPS = {**SGD, "schedule": "step"}
# gcr.md: "RSB A1/A2/A3 LAMB .005/.005/.008, wd .01/.02/.02, 600/300/100 epochs, head lr .3"; arXiv 2110.00476, table 2;
# clipping by LAMB's own default, and the last rate of 1e-6, in timm, in mmpretrain and in the official program.
RSB = {
    "model": "timm/resnet50d", "optimizer": "lamb", "head_lr": 0.3, "batch_size": 2048, "warmup_epochs": 5, "clip": 1.0,
    "cutmix": 1.0, "crop_pct": 0.95,
}  # fmt: skip
A12 = {**RSB, "lr": 0.005, "floor": 2e-4, "set": ("drop_path_rate=0.05",), "repeats": 3}
A12["auto_augment"] = "rand-m7-mstd0.5-inc1"
PAPERS = {
    "r50": {**STEPS, "model": "timm/resnet50"},
    "r50d": {**SGD, "model": "timm/resnet50d"},
    "r101d": {**SGD, "model": "timm/resnet101d"},
    "r152d": {**SGD, "model": "timm/resnet152d"},
    "resnext50": {**SGD, "model": "timm/resnext50_32x4d"},
    # "VGG drops its last dropout."
    "vgg13_bn": {**STEPS, "model": "timm/vgg13_bn", "set": ("drop_rate=0.5",), "head_dropout": False},
    # gcr.md: "AdamW 1e-3, wd .05, batch 1024, 300 epochs, head lr .1"; the rest: arXiv 2103.14030, appendix A2.1.
    "swin_t": {
        "model": "timm/swin_tiny_patch4_window7_224", "optimizer": "adamw", "lr": 1e-3, "head_lr": 0.1,
        "weight_decay": 0.05, "batch_size": 1024, "epochs": 300, "warmup_epochs": 20, "floor": 0.01, "clip": 5.0,
        "set": ("drop_path_rate=0.2",), "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
        "erase": 0.25, "label_smoothing": 0.1, "crop_pct": 0.9,
    },
    # gcr.md: "LAMB 4e-3, wd .05, 2048, 800 epochs, head lr .3, CE instead of BCE"; the rest: arXiv 2204.07118, table 1.
    "deit3_s": {
        "model": "timm/deit3_small_patch16_224", "optimizer": "lamb", "lr": 4e-3, "head_lr": 0.3, "weight_decay": 0.05,
        "batch_size": 2048, "epochs": 800, "warmup_epochs": 5, "clip": 1.0, "set": ("drop_path_rate=0.05",),
        "auto_augment": "3a", "color_jitter": 0.3, "mixup": 0.8, "cutmix": 1.0, "repeats": 3, "crop_pct": 1.0,
    },
    "rsb_a1": {**A12, "weight_decay": 0.01, "epochs": 600, "mixup": 0.2, "label_smoothing": 0.1},
    "rsb_a2": {**A12, "weight_decay": 0.02, "epochs": 300, "mixup": 0.1},
    "rsb_a3": {
        **RSB, "lr": 0.008, "floor": 1.25e-4, "weight_decay": 0.02, "epochs": 100, "mixup": 0.1,
        "auto_augment": "rand-m6-mstd0.5-inc1", "img_size": 160, "eval_size": 224,
    },
    # widenet.md: "LAMB lr .01, wd .1, batch 4096, 300 epochs, 30 warm-up, linear decay, clip 1, label smoothing .1,
    # mixup .5, RandAugment(2, 15) + Inception crop".
    "widenet": {
        "model": "widenet_b16", "head": "linear", "optimizer": "lamb", "lr": 0.01, "weight_decay": 0.1,
        "batch_size": 4096, "epochs": 300, "warmup_epochs": 30, "schedule": "linear", "clip": 1.0,
        "label_smoothing": 0.1, "mixup": 0.5, "auto_augment": "rand-m15-mmax15-n2", "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    },
}  # fmt: skip
# Baselines, where they differ in more than the head and its rate.
LINEAR = {name: {"loss": "bce", "bce_threshold": 0.2} for name in ("rsb_a1", "rsb_a2", "rsb_a3")}
LINEAR["vgg13_bn"] = {"head_dropout": True}
TEXTS: dict[str, dict[str, object]] = {
    # arXiv 1909.11942, section 4.1: LAMB, batches of 4096, 125,000 steps of 512 tokens, sentence order; warm-up, decay
    # and clipping as in its program.
    "albert": {
        "model": "albert_base", "set": (), "optimizer": "lamb", "lr": 1.76e-3, "schedule": "linear", "warmup": 3125,
        "warmup_epochs": None, "steps": 125_000, "epochs": None, "floor": 0.0, "weight_decay": 0.01, "clip": 1.0,
        "batch_size": 4096, "seq_len": 512, "mask_rate": 0.15, "sentence_order": True,
    },
    # widenet.md: "MNLI 3e-5/128; SST-2 4e-5/128".
    "sst2": {"lr": 4e-5, "batch_size": 128},
    "mnli": {"lr": 3e-5, "batch_size": 128},
    # widenet.md: "SQuAD lr 5e-5 batch 48"; steps, warm-up, lengths and dropout: arXiv 1909.11942, table 14.
    "squad": {
        "lr": 5e-5, "batch_size": 48, "steps": 3649, "warmup": 365, "seq_len": 384, "set": ("dropout=0",),
        "epochs": None, "warmup_epochs": None, "schedule": "linear", "floor": 0.0, "weight_decay": 0.01, "clip": 1.0,
    },
}  # fmt: skip
TEXTS["squad_v2"] = {**TEXTS["squad"], "steps": 8144, "warmup": 814, "seq_len": 512}


def figures(config: RunConfig) -> dict[str, object]:
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in RUNNING}
    # A quotient is off by its rounding.
    return {name: float(f"{value:.12g}") if type(value) is float else value for name, value in values.items()}


@pytest.mark.parametrize("head", ["grassmann", "linear"])
@pytest.mark.parametrize("name", RECIPES)
def test_image_recipes_have_the_papers_figures(name, head):
    papers = {**IMAGENET, **PAPERS[name], "head": head}
    if head == "linear":
        papers |= {"head_lr": None, **LINEAR.get(name, {})}
    assert figures(recipe(name, head=head)) == papers
    own = RECIPES[name]()
    assert isinstance(own, VisionConfig) and own.head == PAPERS[name].get("head", "grassmann")


def test_text_recipes_have_the_papers_figures():
    assert {*MASKED, *FINETUNING, *ANSWERING} == TEXTS.keys()
    albert = figures(mlm_settings("albert", None))
    unpublished = {"tokenizer", "text_column"}
    assert {key: albert[key] for key in albert.keys() - unpublished} == {**COMMON, **TEXTS["albert"]}
    settings = {**dict.fromkeys(FINETUNING, finetune_settings), **dict.fromkeys(ANSWERING, qa_settings)}
    for name, make in settings.items():
        found = figures(make(name, "run", "data"))
        assert {key: found[key] for key in TEXTS[name]} == TEXTS[name]


def test_class_subspaces_have_the_papers_scale_and_dimension():
    assert (GrassmannHead(16, 3).scale, GrassmannHead(16, 3).subspace_dim) == (25, 8)
    assert recipe("r50d", k=16).subspace_dim == 16


def test_recipes_name_models_that_there_are():
    timm = pytest.importorskip("timm")
    models = [recipe(name).model for name in RECIPES]
    assert all(timm.is_model(model.removeprefix("timm/")) for model in models if model != "widenet_b16")
    with pytest.raises(ValueError, match="unknown recipe 'r50e'; did you mean"):
        recipe("r50e")
