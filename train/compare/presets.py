"""Comparisons by name: those of the papers in full, and each of them small."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...archs.registry import unknown
from ..config import LMConfig, VisionConfig
from ..recipes import RECIPES, recipe
from .plan import Comparison, merged, read_comparisons

CONTROLS = ("convolution", "hadamard", "concatenation", "local_attention")
RESIDUALS = ("plain", "hc", "mhc", "mhc_lite", "kromhc")
LRS = (1e-3, 3e-3, 1e-2)
DIMENSIONS = (1, 2, 4, 8, 16, 32)
WIKITEXT: dict[str, Any] = {"data": "wikitext:wikitext-2-raw-v1", "tokenizer": "bert-base-uncased"}
PAPER: dict[str, Any] = {"epochs": 30, "eval_epochs": 1.0, "warmup": 2000, "weight_decay": 0.01, "samples": 0}
SMALL_TEXT: dict[str, Any] = {
    "data": "pydoc", "tokenizer": "bpe:1024", "seq_len": 64, "batch_size": 8, "steps": 120, "warmup": 12,
    "eval_every": 30, "save_every": 0, "samples": 0, "device": "cpu",
}  # fmt: skip
DIGITS: dict[str, Any] = {
    "data": "digits", "img_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": "padded", "crop_pct": 1.0,
    "hflip": 0.0, "batch_size": 32, "steps": 120, "warmup": 12, "eval_every": 30, "save_every": 0, "device": "cpu",
}  # fmt: skip
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
            arms=_texts(
                {name: {"model": f"{name}_lm_{layers}l"} for name in ("transformer", "grassmann")},
                **{**WIKITEXT, **PAPER, "seq_len": length, "batch_size": batch},
            ),
            lrs=(1e-4, 3e-4, 1e-3),
        )
        for layers, length, batch in rows
    ]


def wikitext2_tuned() -> list[Comparison]:
    """The same at 6 layers with what replications found better: pre-norm, dropout, several offsets or one a layer."""
    arms = {
        "transformer": {"model": "transformer_lm_6l"},
        "grassmann, one offset a layer": {"model": "grassmann_lm_6l"},
        "grassmann, offsets 1 2 4": {"model": "grassmann_lm_6l", "set": ("offsets=1,2,4",)},
        "grassmann, rank 64": {"model": "grassmann_lm_6l", "set": ("rank=64",)},
    }
    settings = {**WIKITEXT, **PAPER, "set": ("norm=pre", "dropout=0.1")}
    title = "WikiText-2, 6 layers, 128 tokens, pre-norm, dropout 0.1"
    return [Comparison("wikitext2-tuned", title, _texts(arms, **settings), (3e-4, 1e-3, 3e-3))]


def controls() -> list[Comparison]:
    """Whether the wedge earns its keep: plainer pairings of the same tokens at equal parameters."""
    arms = {name: {"set": (f"mixer={name}",)} for name in ("grassmann", *CONTROLS)}
    settings = {**WIKITEXT, **PAPER, "model": "grassmann_lm_6l", "set": ("norm=pre", "dropout=0.1")}
    title = "WikiText-2, 6 layers: the Grassmann mixer and its controls at equal parameters"
    return [Comparison("controls", title, _texts(arms, **settings), (3e-4, 1e-3, 3e-3))]


def residuals() -> list[Comparison]:
    """arXiv 2601.21579 at D = 6, C = 384: the plain residual and four hyper-connections of four streams."""
    settings = {**WIKITEXT, "model": "kromhc_lm_6l", "optimizer": "muon", "seq_len": 256, "batch_size": 32}
    settings |= {"epochs": 10, "eval_epochs": 1.0, "warmup": 200, "weight_decay": 0.1, "samples": 0}
    title = "WikiText-2, 6 layers of width 384, 256 tokens, Muon: residuals"
    return [Comparison("residuals", title, _texts(_residuals(), **settings), (2.5e-3, 5e-3, 1e-2))]


def sharing() -> list[Comparison]:
    """arXiv 2107.11817 on CIFAR-10: unshared, all shared (ALBERT), all shared with experts (WideNet)."""
    arms = _sharing(dim=96, ffn_dim=384)
    settings = {**CIFAR, "model": "widenet_cifar", "batch_size": 256, "epochs": 100, "eval_epochs": 5.0}
    settings |= {"warmup_epochs": 5.0, "weight_decay": 0.05, "clip": 1.0, "label_smoothing": 0.1}
    settings |= {"auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.5}
    title = "CIFAR-10, patches of 4, 12 blocks of width 192: sharing across depth"
    return [Comparison("sharing", title, _images(arms, **settings), (5e-4, 1e-3, 2e-3))]


def heads() -> list[Comparison]:
    """arXiv 2308.01547 on CIFAR-10: linear, cosine and Grassmann heads on a ResNet-18."""
    settings = {**CIFAR, "model": "timm/resnet18", "optimizer": "sgd", "betas": (0.9, 0.999), "batch_size": 128}
    settings |= {"epochs": 50, "eval_epochs": 5.0, "weight_decay": 5e-4, "warmup_epochs": 1.0}
    return [Comparison("heads", "CIFAR-10, ResNet-18: heads", _images(_heads(), **settings), (0.03, 0.1, 0.3))]


def imagenet(name: str) -> list[Comparison]:
    """A recipe of the papers, at its own learning rate."""
    if name == "widenet":
        arms = {model: replace(recipe(name), model=model) for model in ("vit_b16", "widenet_b16")}
        first = arms["vit_b16"]
    else:
        first = recipe(name, head="linear")
        ks = DIMENSIONS if name == "r50d" else (8,)
        # The cosine head is trained as the linear one is.
        arms = {"softmax": first, "cosine": replace(first, head="cosine")}
        arms |= {f"GCR k={k}": recipe(name, head="grassmann", k=k) for k in ks}
    return [Comparison(f"imagenet-{name}", f"ImageNet-1K, recipe {name}", arms, (first.lr,))]


def smoke() -> list[Comparison]:
    """Each comparison on data that every installation has, minutes on two CPU cores; it shows that all of it works."""
    pairs = {"transformer": {"set": ("mixer=attention", "num_heads=4")}}
    pairs |= {name: {"set": (f"mixer={name}", "rank=16")} for name in ("grassmann", *CONTROLS)}
    mixers = {**SMALL_TEXT, "model": "grassmann_lm_6l"}
    mixers["set"] = ("dim=64", "depth=4", "ffn_dim=256", "norm=pre")
    streams = {**SMALL_TEXT, "model": "kromhc_lm_6l", "set": ("dim=64", "depth=3", "ffn_dim=256", "num_heads=2")}
    blocks = {**DIGITS, "model": "widenet_cifar", "weight_decay": 0.05, "clip": 1.0}
    blocks["set"] = ("dim=48", "depth=4", "ffn_dim=96", "patch_size=4", "dropout=0.0")
    nets = {**DIGITS, "model": "timm/resnet10t", "optimizer": "sgd", "weight_decay": 5e-4}
    nets["set"] = ("channels=16,32,64,64", "stem_width=8")
    text = "A smoke test on CPython's documentation, models of some hundred thousand parameters"
    image = "A smoke test on scikit-learn's digits, models of some ten or hundred thousand parameters"
    return [
        _small("mixers", "Mixers, 4 layers of width 64", text, _texts(pairs, **mixers), LRS),
        _small("residuals", "Residuals, 3 layers of width 64", text, _texts(_residuals(), **streams), LRS),
        _small("sharing", "Sharing, 4 blocks of width 48", image, _images(_sharing(39, 78), **blocks), LRS),
        _small("heads", "Heads on a ResNet-10-T", image, _images(_heads(), **nets), (0.01, 0.03, 0.1)),
    ]


def _small(name: str, title: str, what: str, arms: Mapping[str, Any], lrs: tuple[float, ...]) -> Comparison:
    note = f"{what}. It says nothing about the architectures at the papers' sizes."
    return Comparison(f"smoke-{name}", title, arms, lrs, note=note)


def _residuals() -> dict[str, dict[str, Any]]:
    return {name: {"set": (f"residual={name}",)} for name in RESIDUALS}


def _sharing(dim: int, ffn_dim: int) -> dict[str, dict[str, Any]]:
    """Arms over a WideNet's settings; the last one is a ViT of about the WideNet's parameters."""
    return {
        "unshared (ViT)": {"set": ("ffn=mlp", "share=[]")},
        "ALBERT-like": {"set": ("ffn=mlp",)},
        "WideNet": {},
        "ViT of WideNet's parameters": {"set": ("ffn=mlp", "share=[]", f"dim={dim}", f"ffn_dim={ffn_dim}")},
    }


def _heads() -> dict[str, dict[str, Any]]:
    dimensions = {f"GCR k={k}": {"head": "grassmann", "subspace_dim": k} for k in DIMENSIONS}
    return {"softmax": {}, "cosine": {"head": "cosine"}, **dimensions}


def _texts(arms: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, LMConfig]:
    return {name: LMConfig(**merged(common, own)) for name, own in arms.items()}


def _images(arms: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, VisionConfig]:
    return {name: VisionConfig(**merged(common, own)) for name, own in arms.items()}


PRESETS: dict[str, Callable[[], list[Comparison]]] = {
    "wikitext2-paper": wikitext2_paper,
    "wikitext2-tuned": wikitext2_tuned,
    "controls": controls,
    "residuals": residuals,
    "sharing": sharing,
    "heads": heads,
    "smoke": smoke,
    **{f"imagenet-{name}": lambda name=name: imagenet(name) for name in RECIPES},
}
