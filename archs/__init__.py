"""Models made of four slots — mixer, residual, ffn, head — and every layer on its own."""

from . import presets  # noqa: F401  (registers the paper's models)
from .config import ModelConfig
from .ffns import MLP, SharedMoE
from .heads import LinearHead, TiedHead
from .heads.cross_entropy import linear_cross_entropy
from .io import CheckpointError, MissingCheckpointError, atomic_write, load_model, read_config, save_model
from .lm import LanguageModel
from .mixers import CausalAttention, CausalGrassmannMixer
from .registry import create_model, list_models, model_config, register_model, register_slot
from .residuals import PlainResidual

__all__ = [
    "MLP",
    "CausalAttention",
    "CausalGrassmannMixer",
    "CheckpointError",
    "LanguageModel",
    "LinearHead",
    "MissingCheckpointError",
    "ModelConfig",
    "PlainResidual",
    "SharedMoE",
    "TiedHead",
    "atomic_write",
    "create_model",
    "linear_cross_entropy",
    "list_models",
    "load_model",
    "model_config",
    "read_config",
    "register_model",
    "register_slot",
    "save_model",
]
