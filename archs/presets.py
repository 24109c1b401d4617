"""The paper's models by name."""

from typing import Any

from .config import ModelConfig
from .encoder import EncoderConfig
from .registry import register_model
from .vision import VisionConfig


@register_model("grassmann_lm_6l")
def grassmann_lm_6l() -> ModelConfig:
    """arXiv 2512.19428, 6 layers, 128 tokens: 13,001,920 parameters."""
    return _grassmann(depth=6, schedule=(1, 2, 4, 8, 12, 16))


@register_model("grassmann_lm_12l")
def grassmann_lm_12l() -> ModelConfig:
    """arXiv 2512.19428, 12 layers: 18,156,928 parameters.

    The paper's counts are for 128 positions even here; its runs at 256 tokens need `max_len=256` (32,768 more).
    """
    return _grassmann(depth=12, schedule=(1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16))


@register_model("transformer_lm_6l")
def transformer_lm_6l() -> ModelConfig:
    """The paper's baseline, 6 layers, 128 tokens: 12,585,472 parameters."""
    return ModelConfig(mixer="attention", depth=6, options={"num_heads": 4})


@register_model("transformer_lm_12l")
def transformer_lm_12l() -> ModelConfig:
    """The paper's baseline, 12 layers: 17,324,032 parameters; `max_len=256` as in `grassmann_lm_12l`."""
    return ModelConfig(mixer="attention", depth=12, options={"num_heads": 4})


@register_model("kromhc_lm_6l")
def kromhc_lm_6l() -> ModelConfig:
    """arXiv 2601.21579, D = 6, C = 384, n = 4: a causal Transformer with pre-norm branches and KromHC residuals."""
    return _kromhc(depth=6)


@register_model("kromhc_lm_12l")
def kromhc_lm_12l() -> ModelConfig:
    """arXiv 2601.21579, D = 12, C = 768, n = 4: 958,824 parameters of hyper-connections, the paper's 959K."""
    return _kromhc(depth=12)


def _kromhc(depth: int) -> ModelConfig:
    """nanochat's sizes: 64 channels a layer, heads of 128, four times as wide an ffn. `residual=` gives the rivals."""
    dim = 64 * depth
    return ModelConfig(
        vocab_size=32768, max_len=2048, dim=dim, depth=depth, ffn_dim=4 * dim, norm="pre", mixer="attention",
        residual="kromhc", options={"num_heads": dim // 128, "num_streams": 4},
    )  # fmt: skip


def _grassmann(depth: int, schedule: tuple[int, ...]) -> ModelConfig:
    """One offset a layer, in schedule order; the undescribed Linear(d, d) that the paper's counts show."""
    offsets = tuple((delta,) for delta in schedule)
    options = {"rank": 32, "offsets": offsets, "out_proj": True}
    return ModelConfig(mixer="grassmann", depth=depth, options=options)


BOTH = ("mixer", "ffn")


@register_model("widenet_b16")
def widenet_b16() -> VisionConfig:
    """arXiv 2107.11817, 12 blocks: 29,691,369 parameters with 1001 classes."""
    return _widenet(dim=768, depth=12, ffn_dim=4096, heads=12)


@register_model("widenet_l16")
def widenet_l16() -> VisionConfig:
    """arXiv 2107.11817, 24 blocks: 40,942,569 parameters with 1001 classes."""
    return _widenet(dim=1024, depth=24, ffn_dim=4096, heads=16)


@register_model("widenet_h16")
def widenet_h16() -> VisionConfig:
    """arXiv 2107.11817, 32 blocks: 63,343,081 parameters with 1001 classes."""
    return _widenet(dim=1280, depth=32, ffn_dim=5120, heads=16)


@register_model("widenet_cifar")
def widenet_cifar() -> VisionConfig:
    """A WideNet for images of 32 × 32 in 10 classes; not in the paper."""
    return _widenet(dim=192, depth=12, ffn_dim=768, heads=3, image_size=32, patch_size=4, num_classes=10)


@register_model("vit_b16")
def vit_b16() -> VisionConfig:
    """The paper's baseline ViT-B/16: 87,158,249 parameters with 1001 classes."""
    return _vision(dim=768, depth=12, ffn_dim=3072, heads=12)


@register_model("vit_l16")
def vit_l16() -> VisionConfig:
    """The paper's baseline ViT-L/16: 305,376,233 parameters with 1001 classes."""
    return _vision(dim=1024, depth=24, ffn_dim=4096, heads=16)


@register_model("vit_moe_b16")
def vit_moe_b16() -> VisionConfig:
    """The paper's baseline ViT-MoE-B/16, experts in the last 2 blocks: 128,090,089 parameters with 1001 classes."""
    return _vision(dim=768, depth=12, ffn_dim=3072, heads=12, moe_blocks=2)


@register_model("vit_moe_l16")
def vit_moe_l16() -> VisionConfig:
    """The paper's baseline ViT-MoE-L/16, experts in the last 4 blocks: 406,117,353 parameters with 1001 classes."""
    return _vision(dim=1024, depth=24, ffn_dim=4096, heads=16, moe_blocks=4)


@register_model("widenet_albert_4e")
def widenet_albert_4e() -> EncoderConfig:
    """arXiv 2107.11817, language, 4 experts: 25,887,744 parameters."""
    return _widenet_albert(4)


@register_model("widenet_albert_8e")
def widenet_albert_8e() -> EncoderConfig:
    """arXiv 2107.11817, language, 8 experts: 44,780,544 parameters."""
    return _widenet_albert(8)


@register_model("widenet_albert_16e")
def widenet_albert_16e() -> EncoderConfig:
    """arXiv 2107.11817, language, 16 experts: 82,566,144 parameters."""
    return _widenet_albert(16)


@register_model("albert_base")
def albert_base() -> EncoderConfig:
    """The paper's baseline ALBERT, LayerNorms shared too: 11,683,584 parameters."""
    return EncoderConfig(share=BOTH, share_norms=True, options={"num_heads": 12})


@register_model("bert_factorised")
def bert_factorised() -> EncoderConfig:
    """The paper's baseline BERT with ALBERT's factorised embedding: 89,650,176 parameters."""
    return EncoderConfig(options={"num_heads": 12})


def _vision(dim: int, depth: int, ffn_dim: int, heads: int, **fields: Any) -> VisionConfig:
    options = {"num_heads": heads, "norm_eps": 1e-6, **fields.pop("options", {})}
    sizes = {"dim": dim, "depth": depth, "ffn_dim": ffn_dim, "num_classes": 1001, "dropout": 0.1}
    return VisionConfig(**{**sizes, **fields}, options=options)


def _widenet(dim: int, depth: int, ffn_dim: int, heads: int, **fields: Any) -> VisionConfig:
    experts = {"num_experts": 4, "top_k": 2, "capacity_factor": 1.2}
    return _vision(dim, depth, ffn_dim, heads, ffn="shared_moe", share=BOTH, options=experts, **fields)


def _widenet_albert(experts: int) -> EncoderConfig:
    options = {"num_heads": 12, "num_experts": experts, "top_k": 2, "capacity_factor": 1.2}
    return EncoderConfig(ffn="shared_moe", share=BOTH, options=options)
