"""Training data. Text: sources, tokenisers, a memory-mapped cache of token files, the order in which blocks are drawn.

Images, in modules of their own that are imported on demand: `image_sources`, `images`, `image_batches`.
"""

from .blocks import BlockOrder, block_batch, evaluation_batches, num_blocks
from .corpus import Corpus, Split, load_corpus
from .sources import load_text
from .tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "BlockOrder",
    "Corpus",
    "Split",
    "block_batch",
    "evaluation_batches",
    "load_corpus",
    "load_text",
    "load_tokenizer",
    "num_blocks",
    "save_tokenizer",
]
