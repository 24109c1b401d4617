"""The settings of training on sentence pairs."""

from dataclasses import dataclass
from typing import Literal

from .config import RunConfig


@dataclass(frozen=True, kw_only=True)
class NLIConfig(RunConfig):
    """Natural language inference: a head on an encoder's token features (arXiv 2512.19428, section 4.2)."""

    model: Literal["plucker", "transformer"] = "plucker"
    """The head: Grassmann-Plücker mixing, or its self-attention baseline. `--set` takes its sizes: d_proj=64 …"""
    data: str = "snli"
    """A folder with train, dev and test JSON-lines files in SNLI's format, one such file, or a hub name[:config]."""
    encoder: str = "distilbert-base-uncased"
    """What makes the features: a hub name, a local folder, or random (a tiny DistilBERT, to try things out)."""
    tokenizer: str | None = None
    """By default the encoder's own (random: bpe:4096); as for lm: bpe:SIZE, a file, a folder or a hub name."""
    fine_tune: bool = False
    """Train the encoder too, at the same learning rate; otherwise it is a fixed feature extractor."""
    max_len: int = 48
    """Tokens of a pair, [CLS] and both [SEP] included; the longer sentence gives way."""
    epochs: float | None = 20
    """Passes over the training data; counts in place of --steps."""
    eval_epochs: float | None = 1
    """Passes between validations; counts in place of --eval-every, and for checkpoints if --save-every is not given."""
    lr: float = 3e-4
    """Peak learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_len < 5:
            raise ValueError(f"max_len must be at least 5, one token a sentence and three marks, got {self.max_len}")
