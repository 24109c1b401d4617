"""The settings of an evaluation by lm-eval."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a trained language model with EleutherAI's lm-eval."""

    folder: Path
    """Folder of the run."""
    tasks: tuple[str, ...] = ()
    """Names of tasks: lm-eval's own, or those of --include-path."""
    include_path: Path | None = None
    """Folder with further tasks' YAML files."""
    num_fewshot: int | None = None
    """Examples in the prompt; by default what the task says."""
    limit: int | None = None
    """Evaluate only so many examples of a task."""
    batch_size: int = 8
    """Sequences scored at once."""
    prefix: str | None = None
    """A token of the vocabulary that the first token of a text is conditioned on, such as [CLS]; by default the first
    token is context alone and does not count."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    seed: int = 0
    """Seed of the choice of examples and of sampling."""
    out: Path | None = None
    """The JSON file to write; by default eval.json in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
