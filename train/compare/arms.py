"""The arms of the comparisons: what differs in each, whatever the size of the models."""

from collections.abc import Mapping
from typing import Any

from ..config import LMConfig, VisionConfig
from .plan import merged

CONTROLS = ("convolution", "hadamard", "concatenation", "local_attention")
RESIDUALS = ("plain", "hc", "mhc", "mhc_lite", "kromhc")
DIMENSIONS = (1, 2, 4, 8, 16, 32)
# Other libraries' baselines, beside our own of the same sizes.
GPT2, TIMM_VIT = "GPT-2 (transformers)", "timm/vit_tiny_patch16_224"
Arms = dict[str, dict[str, Any]]


def papers_models(layers: int, rank: int = 32) -> Arms:
    """The two presets of arXiv 2512.19428 of that depth."""
    names = {name: f"{name}_lm_{layers}l" for name in ("transformer", "grassmann")}
    return {"transformer": {"model": names["transformer"]}, "grassmann": _grassmann(names["grassmann"], rank)}


def tuned_models(rank: int = 32) -> Arms:
    """The Transformer with GPT-2's start and with ours, and Grassmann models: offsets one a layer or several, GPT-2's
    start, and twice the rank."""
    model = "grassmann_lm_6l"
    return {
        "transformer, scaled init": {"model": "transformer_lm_6l", "set": ("scaled_init=True",)},
        "transformer": {"model": "transformer_lm_6l"},
        "grassmann, one offset a layer": _grassmann(model, rank),
        "grassmann, scaled init": _grassmann(model, rank, "scaled_init=True"),
        "grassmann, offsets 1 2 4": _grassmann(model, rank, "offsets=1,2,4"),
        f"grassmann, rank {2 * rank}": _grassmann(model, 2 * rank),
    }


def _grassmann(model: str, rank: int, *more: str) -> dict[str, Any]:
    return {"model": model, "set": (f"rank={rank}", *more)}


def gpt2(dim: int, dropout: float) -> tuple[str, ...]:
    """What `set` says of transformers' GPT-2 with the sizes of `transformer_lm_6l` at width `dim`."""
    rates = (f"{place}_pdrop={dropout}" for place in ("resid", "embd", "attn"))
    return (f"n_embd={dim}", "n_layer=6", "n_head=4", *rates)


def pooled_vits(dim: int, depth: int, ffn_dim: int, patch_size: int, **common: Any) -> dict[str, VisionConfig]:
    """The unshared ViT of `shared_blocks` with the class token for the mean over tokens, and timm's of these sizes and
    three heads with either; timm's mean leaves the class token out and comes before the last norm."""
    sizes = (f"embed_dim={dim}", f"depth={depth}", "num_heads=3", f"mlp_ratio={ffn_dim / dim:g}")
    timms = {**common, "model": TIMM_VIT, "set": (*sizes, f"patch_size={patch_size}")}
    return {
        **images({"unshared, class token": {"set": ("ffn=mlp", "share=[]", "pooling=cls")}}, **common),
        **images({"ViT (timm)": {"set": ("global_pool=avg",)}, "ViT (timm), class token": {}}, **timms),
    }


def mixers() -> Arms:
    """The Grassmann mixer, and plainer pairings of the same tokens at equal parameters."""
    return {name: {"set": (f"mixer={name}",)} for name in ("grassmann", *CONTROLS)}


def residual_streams() -> Arms:
    """The plain residual and hyper-connections."""
    return {name: {"set": (f"residual={name}",)} for name in RESIDUALS}


def shared_blocks(*narrow: str) -> Arms:
    """Over a WideNet's settings; `narrow` makes the last one a ViT of about the WideNet's parameters."""
    return {
        "unshared (ViT)": {"set": ("ffn=mlp", "share=[]")},
        "ALBERT-like": {"set": ("ffn=mlp",)},
        "WideNet": {},
        "ViT of WideNet's parameters": {"set": ("ffn=mlp", "share=[]", *narrow)},
    }


def heads(**grassmann: Any) -> Arms:
    """Linear and cosine classifier, and Grassmann ones with the settings that they have apart from the others."""
    dimensions = {f"GCR k={k}": {"head": "grassmann", "subspace_dim": k, **grassmann} for k in DIMENSIONS}
    return {"softmax": {}, "cosine": {"head": "cosine"}, **dimensions}


def texts(arms: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, LMConfig]:
    """Language models with these settings in common."""
    return {name: LMConfig(**merged(common, own)) for name, own in arms.items()}


def images(arms: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, VisionConfig]:
    """Image models with these settings in common."""
    return {name: VisionConfig(**merged(common, own)) for name, own in arms.items()}
