"""The papers' comparisons small: four hours on two CPU cores with the papers' data, minutes with what is embedded."""

from collections.abc import Mapping
from typing import Any

from ..config import LMConfig, RunConfig
from . import arms
from .plan import Comparison

LRS = (1e-3, 3e-3, 1e-2)
SHORT: dict[str, Any] = {"save_every": 0, "device": "cpu"}
PYDOC: dict[str, Any] = {
    **SHORT, "data": "pydoc", "tokenizer": "bpe:1024", "seq_len": 64, "batch_size": 8, "steps": 120, "warmup": 12,
    "eval_every": 30, "samples": 0,
}  # fmt: skip
DIGITS: dict[str, Any] = {
    **SHORT, "data": "digits", "img_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": "padded",
    "crop_pct": 1.0, "hflip": 0.0, "batch_size": 32, "steps": 120, "warmup": 12, "eval_every": 30,
}  # fmt: skip
WIKITEXT: dict[str, Any] = {
    **SHORT, "data": "wikitext:wikitext-2-raw-v1", "tokenizer": "bpe:4096", "seq_len": 128, "batch_size": 8,
    "steps": 300, "warmup": 30, "eval_every": 75, "valid_batches": 64, "weight_decay": 0.01, "samples": 0,
}  # fmt: skip
CIFAR: dict[str, Any] = {
    **SHORT, "data": "cifar10", "img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616),
    "crop": "padded", "crop_pct": 1.0, "batch_size": 64, "warmup": 70,
}  # fmt: skip
SIZES = ("dim=128", "ffn_dim=512")


def wikitext2_cpu() -> list[Comparison]:
    """Every comparison of language models at a width of 128 and a tenth of an epoch, the mixers at half of one, too."""
    paper = {**WIKITEXT, "set": SIZES}
    tuned = {**WIKITEXT, "set": (*SIZES, "norm=pre")}
    controls = {**WIKITEXT, "model": "grassmann_lm_6l", "set": (*SIZES, "norm=pre", "rank=16")}
    streams = {**WIKITEXT, "model": "kromhc_lm_6l", "optimizer": "muon", "weight_decay": 0.1}
    streams |= {"set": (*SIZES, "num_heads=2"), "steps": 200, "warmup": 20, "eval_every": 50}
    longer: arms.Arms = {
        mixer: {"model": "grassmann_lm_6l", "set": (f"mixer={mixer}", "rank=16")}
        for mixer in ("grassmann", "convolution", "hadamard", "local_attention")
    }
    longer["transformer, scaled init"] = {"model": "transformer_lm_6l", "set": ("scaled_init=True",)}
    gpt2 = LMConfig(**{**WIKITEXT, "model": "hf/gpt2", "set": arms.gpt2(128, dropout=0.0)})
    plans = {
        "paper-6l": ("6 layers, 128 tokens, post-norm", arms.texts(arms.papers_models(6, rank=16), **paper)),
        "paper-12l": (
            "12 layers, 256 tokens, post-norm",
            arms.texts(arms.papers_models(12, rank=16), **{**paper, "seq_len": 256, "batch_size": 4}),
        ),
        "tuned": (
            "6 layers, 128 tokens, pre-norm",
            {**arms.texts(arms.tuned_models(rank=16), **tuned), arms.GPT2: gpt2},
        ),
        "controls": ("6 layers: Grassmann mixer and controls", arms.texts(arms.mixers(), **controls)),
        "longer": (
            "6 layers, five times as long",
            arms.texts(longer, **{**tuned, "steps": 1500, "warmup": 150, "eval_every": 375}),
        ),
        "residuals": ("6 layers, Muon: residuals", arms.texts(arms.residual_streams(), **streams)),
    }
    lrs = {
        "paper-6l": (3e-4, 1e-3, 3e-3),
        "paper-12l": (3e-4, 1e-3, 3e-3),
        "longer": (3e-3,),  # what was best, or next to it, for every arm in the shorter runs
        "residuals": (5e-3, 1e-2, 2e-2),
    }
    note = "Sized for two CPU cores: {}, validation on the first 65,536 tokens of its split."
    size = {"longer": "half an epoch at the rate that was best for all arms in shorter runs"}
    return [
        Comparison(
            f"wikitext2-cpu-{name}", f"WikiText-2, {title}, width 128", runs, lrs.get(name, LRS),
            note=note.format(size.get(name, "a tenth of an epoch or less")),
        )
        for name, (title, runs) in plans.items()
    ]  # fmt: skip


def cifar10_cpu() -> list[Comparison]:
    """Every comparison of image models, an epoch or two of them."""
    blocks = {**CIFAR, "model": "widenet_cifar", "steps": 700, "eval_every": 175, "weight_decay": 0.05, "clip": 1.0}
    blocks["set"] = ("dim=96", "depth=6", "ffn_dim=192", "patch_size=8", "dropout=0.0", "pre_logits=False")
    nets = {**CIFAR, "model": "timm/resnet10t", "optimizer": "sgd", "betas": (0.9, 0.999), "weight_decay": 5e-4}
    nets |= {"set": ("channels=16,32,64,128", "stem_width=8"), "steps": 1400, "eval_every": 350}
    shared = arms.images(arms.shared_blocks("dim=64", "ffn_dim=128", "num_heads=2"), **blocks)
    shared |= arms.pooled_vits(96, 6, 192, 8, **blocks)
    # 0.01 was the best of 0.001, 0.003 and 0.01 for k = 4 and 8 in runs of half an epoch.
    heads = arms.heads(head_lr=0.01)
    heads["GCR k=8, head lr 0.1"] = {**heads["GCR k=8"], "head_lr": 0.1}
    note = "Sized for two CPU cores: {} of batches of 64, {}."
    return [
        Comparison(
            "cifar10-cpu-sharing", "CIFAR-10, patches of 8, 6 blocks of width 96: sharing across depth", shared,
            (5e-4, 1.5e-3, 4.5e-3), note=note.format("an epoch", "crops and flips the only augmentation"),
        ),
        Comparison(
            "cifar10-cpu-heads", "CIFAR-10, ResNet-10-T of 16 to 128 channels: heads", arms.images(heads, **nets),
            (0.03, 0.1, 0.3), note=note.format("two epochs", "the Grassmann heads' own learning rate 0.01 or as said"),
        ),
    ]  # fmt: skip


def smoke() -> list[Comparison]:
    """Each comparison on data that every installation has, minutes on two CPU cores; it shows that all of it works."""
    pairs = {"transformer": {"set": ("mixer=attention", "num_heads=4")}}
    pairs |= {name: {"set": (f"mixer={name}", "rank=16")} for name in ("grassmann", *arms.CONTROLS)}
    mixers = {**PYDOC, "model": "grassmann_lm_6l"}
    mixers["set"] = ("dim=64", "depth=4", "ffn_dim=256", "norm=pre")
    streams = {**PYDOC, "model": "kromhc_lm_6l", "set": ("dim=64", "depth=3", "ffn_dim=256", "num_heads=2")}
    blocks = {**DIGITS, "model": "widenet_cifar", "weight_decay": 0.05, "clip": 1.0}
    blocks["set"] = ("dim=48", "depth=4", "ffn_dim=96", "patch_size=4", "dropout=0.0")
    nets = {**DIGITS, "model": "timm/resnet10t", "optimizer": "sgd", "weight_decay": 5e-4}
    nets["set"] = ("channels=16,32,64,64", "stem_width=8")
    shared = arms.images(arms.shared_blocks("dim=39", "ffn_dim=78"), **blocks)
    residuals = arms.texts(arms.residual_streams(), **streams)
    text = "A smoke test on CPython's documentation, models of some hundred thousand parameters"
    image = "A smoke test on scikit-learn's digits, models of some ten or hundred thousand parameters"
    return [
        _smoke("mixers", "Mixers, 4 layers of width 64", text, arms.texts(pairs, **mixers), LRS),
        _smoke("residuals", "Residuals, 3 layers of width 64", text, residuals, LRS),
        _smoke("sharing", "Sharing, 4 blocks of width 48", image, shared, LRS),
        _smoke("heads", "Heads on a ResNet-10-T", image, arms.images(arms.heads(), **nets), (0.01, 0.03, 0.1)),
    ]


def _smoke(name: str, title: str, what: str, runs: Mapping[str, RunConfig], lrs: tuple[float, ...]) -> Comparison:
    note = f"{what}. It says nothing about the architectures at the papers' sizes."
    return Comparison(f"smoke-{name}", title, runs, lrs, note=note)
