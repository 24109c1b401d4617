"""What the next token costs once a language model has read a context: time, and memory of the decoding state.

The models have the sizes of `transformer_lm_6l` (6 layers of width 256, BERT's vocabulary) and random weights.
`python benchmarks/decode.py [--device cuda] [--dtype bfloat16] [--out benchmarks/results]` prints the times and writes
decode-DEVICE.jsonl.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from grassland.archs import create_model
from grassland.kernels.machine import about
from grassland.train.text_model import build_text_model

DIM, LAYERS, VOCAB = 256, 6, 30522
# Tokens of one measurement; a model reads the next one after those that it wrote.
STEPS = 16


def models(length):
    """(name, a model for that many tokens)."""
    sizes = {"dim": DIM, "depth": LAYERS, "vocab_size": VOCAB, "max_len": length, "norm": "pre"}
    yield "Grassmann", create_model("grassmann_lm_6l", **sizes)
    yield "Transformer", create_model("transformer_lm_6l", **sizes)
    yield "local attention", create_model("grassmann_lm_6l", mixer="local_attention", **sizes)
    try:
        yield (
            "GPT-2 (transformers)",
            build_text_model("hf/gpt2", VOCAB, length, {"n_embd": DIM, "n_layer": LAYERS, "n_head": 4}),
        )
    except ValueError as error:
        print(f"not run: {error}")


class Decoder:
    """A model that has read `context` random tokens in `batch` rows, and goes on with its most likely ones."""

    def __init__(self, model, batch, context, device):
        self.model, self.state = model, model.init_state(batch)
        self.tokens = torch.randint(VOCAB, (batch, context), device=device)
        self.step()

    def step(self):
        self.tokens = self.model.decode(self.tokens, self.state).argmax(-1, keepdim=True)

    def seconds(self, device):
        """The mean over STEPS tokens."""
        start = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS


def tensors(value, seen):
    """All tensors that `value` leads to, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors(entry, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


def measure(context, batch, device, dtype, repeats):
    rows = []
    for name, model in models(context + 1 + (repeats + 1) * STEPS):
        rows.append((name, Decoder(model.to(device, dtype).eval(), batch, context, device), []))
    for repeat in range(repeats + 1):
        for _, decoder, times in rows:
            found = decoder.seconds(device)
            # The first repetition warms up.
            times.extend([found] if repeat else [])
    for name, decoder, times in rows:
        size = sum(tensor.nbytes for tensor in tensors(decoder.state, set()))
        yield {"model": name, "context": context, "batch": batch, "ms": 1e3 * statistics.median(times), "bytes": size}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSONL; nothing is written without it")
    options = parser.parse_args()
    torch.manual_seed(0)
    shared = {"device": options.device.type, "dtype": options.dtype, "dim": DIM, "layers": LAYERS, **about()}
    records = []
    for batch in options.batches:
        for context in options.contexts:
            for record in measure(context, batch, options.device, getattr(torch, options.dtype), options.repeats):
                records.append(record | shared)
                size = record["bytes"] / batch / 2**20
                print(f"B{batch} {context:6} {record['model']:22} {record['ms']:8.2f} ms  state {size:8.3f} MiB a row")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"decode-{options.device.type}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
