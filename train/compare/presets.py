"""Comparisons by name: those of the papers in full, and each of them small."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...archs.registry import unknown
from ..config import LMConfig
from ..recipes import RECIPES, recipe
from . import arms
from .plan import Comparison, read_comparisons
from .small import cifar10_cpu, smoke, wikitext2_cpu

WIKITEXT: dict[str, Any] = {"data": "wikitext:wikitext-2-raw-v1", "tokenizer": "bert-base-uncased"}
PAPER: dict[str, Any] = {"epochs": 30, "eval_epochs": 1.0, "warmup": 2000, "weight_decay": 0.01, "samples": 0}
CIFAR: dict[str, Any] = {
    "data": "cifar10", "img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616),
    "crop": "padded", "crop_pct": 1.0, "dtype": "bf16", "channels_last": True, "workers": 8,
}  # fmt: skip


def load_comparisons(preset: str) -> list[Comparison]:
    """The comparisons of that name, or of that JSON file. ValueError with the nearest names if there is neither."""
    if preset.endswith(".json"):
        return read_comparisons(Path(preset))
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return PRESETS[preset]()


def wikitext2_paper() -> list[Comparison]:
    """arXiv 2512.19428, its table: 6 layers at 128 tokens and 12 layers at 256, Transformer and Grassmann."""
    note = "The paper names no optimiser, schedule or seed and reports validation only: 248.4 / 275.7, 235.2 / 261.1."
    rows = ((6, 128, 32), (12, 256, 16))
    return [
        Comparison(
            name=f"wikitext2-{layers}l",
            title=f"WikiText-2, {layers} layers, {length} tokens, post-norm as in the paper",
            note=note,
            arms=arms.texts(
                arms.papers_models(layers), **{**WIKITEXT, **PAPER, "seq_len": length, "batch_size": batch}
            ),
            lrs=(1e-4, 3e-4, 1e-3),
        )
        for layers, length, batch in rows
    ]


def wikitext2_tuned() -> list[Comparison]:
    """The same at 6 layers with what replications found better: pre-norm, dropout, several offsets or one a layer."""
    settings = {**WIKITEXT, **PAPER, "set": ("norm=pre", "dropout=0.1")}
    runs = arms.texts(arms.tuned_models(), **settings)
    runs[arms.GPT2] = LMConfig(**{**settings, "model": "hf/gpt2", "set": arms.gpt2(256, dropout=0.1)})
    title = "WikiText-2, 6 layers, 128 tokens, pre-norm, dropout 0.1"
    return [Comparison("wikitext2-tuned", title, runs, (3e-4, 1e-3, 3e-3))]


def controls() -> list[Comparison]:
    """Whether the wedge earns its keep: plainer pairings of the same tokens at equal parameters."""
    settings = {**WIKITEXT, **PAPER, "model": "grassmann_lm_6l", "set": ("norm=pre", "dropout=0.1")}
    title = "WikiText-2, 6 layers: the Grassmann mixer and its controls at equal parameters"
    return [Comparison("controls", title, arms.texts(arms.mixers(), **settings), (3e-4, 1e-3, 3e-3))]


def residuals() -> list[Comparison]:
    """arXiv 2601.21579 at D = 6, C = 384: the plain residual and four hyper-connections of four streams."""
    settings = {**WIKITEXT, "model": "kromhc_lm_6l", "optimizer": "muon", "seq_len": 256, "batch_size": 32}
    settings |= {"epochs": 10, "eval_epochs": 1.0, "warmup": 200, "weight_decay": 0.1, "samples": 0}
    title = "WikiText-2, 6 layers of width 384, 256 tokens, Muon: residuals"
    return [Comparison("residuals", title, arms.texts(arms.residual_streams(), **settings), (2.5e-3, 5e-3, 1e-2))]


def sharing() -> list[Comparison]:
    """arXiv 2107.11817 on CIFAR-10: unshared, all shared (ALBERT), all shared with experts (WideNet)."""
    blocks = arms.shared_blocks("dim=96", "ffn_dim=384")
    # timm's ViT has no hidden layer before the head; nor has any arm then.
    settings = {**CIFAR, "model": "widenet_cifar", "set": ("pre_logits=False",), "batch_size": 256}
    settings |= {"epochs": 100, "eval_epochs": 5.0}
    settings |= {"warmup_epochs": 5.0, "weight_decay": 0.05, "clip": 1.0, "label_smoothing": 0.1}
    settings |= {"auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.5}
    runs = arms.images(blocks, **settings)
    runs |= arms.pooled_vits(192, 12, 768, 4, **settings)
    title = "CIFAR-10, patches of 4, 12 blocks of width 192: sharing across depth"
    return [Comparison("sharing", title, runs, (5e-4, 1e-3, 2e-3))]


def heads() -> list[Comparison]:
    """arXiv 2308.01547 on CIFAR-10: linear, cosine and Grassmann heads on a ResNet-18."""
    settings = {**CIFAR, "model": "timm/resnet18", "optimizer": "sgd", "betas": (0.9, 0.999), "batch_size": 128}
    settings |= {"epochs": 50, "eval_epochs": 5.0, "weight_decay": 5e-4, "warmup_epochs": 1.0}
    return [Comparison("heads", "CIFAR-10, ResNet-18: heads", arms.images(arms.heads(), **settings), (0.03, 0.1, 0.3))]


def imagenet(name: str) -> list[Comparison]:
    """A recipe of the papers, at its own learning rate."""
    if name == "widenet":
        runs = {model: replace(recipe(name), model=model) for model in ("vit_b16", "widenet_b16")}
        first = runs["vit_b16"]
    else:
        first = recipe(name, head="linear")
        ks = arms.DIMENSIONS if name == "r50d" else (8,)
        # The cosine head is trained as the linear one is.
        runs = {"softmax": first, "cosine": replace(first, head="cosine")}
        runs |= {f"GCR k={k}": recipe(name, head="grassmann", k=k) for k in ks}
    return [Comparison(f"imagenet-{name}", f"ImageNet-1K, recipe {name}", runs, (first.lr,))]


PRESETS: dict[str, Callable[[], list[Comparison]]] = {
    "wikitext2-paper": wikitext2_paper,
    "wikitext2-tuned": wikitext2_tuned,
    "controls": controls,
    "residuals": residuals,
    "sharing": sharing,
    "heads": heads,
    "wikitext2-cpu": wikitext2_cpu,
    "cifar10-cpu": cifar10_cpu,
    "smoke": smoke,
    **{f"imagenet-{name}": lambda name=name: imagenet(name) for name in RECIPES},
}
