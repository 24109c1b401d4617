"""What is trained: each task brings the model, the batches, the loss and the evaluation; the loop is the same."""

from .base import Task
from .lm import LanguageModeling

__all__ = ["LanguageModeling", "Task"]
