"""What a layer takes of the host when there is next to nothing to compute: Python, torch's dispatcher, autograd.

A GPU waits for it wherever a layer's kernels take less, unless the step is recorded (`--cuda-graph`) or compiled.
`python benchmarks/host.py [--device cuda] [--out benchmarks/results]` prints the times and writes host-DEVICE.jsonl.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from grassland import archs
from grassland.kernels.machine import about

# Batch, tokens and width of the input, classes of the heads, sublayers of a chain, calls of a measurement.
SHAPE, CLASSES, CHAIN, CALLS = (1, 8, 64), 10, 6, 50
WIDTH = SHAPE[-1]


class Chain(nn.Module):
    """A few sublayers with an empty branch one after the other, as in a model."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make(index) for index in range(CHAIN))

    def forward(self, x):
        streams = self.layers[0].expand(x)
        for layer in self.layers:
            streams = layer(streams)
        return self.layers[-1].reduce(streams)


class Loss(nn.Module):
    def __init__(self, head, device):
        super().__init__()
        self.head, self.labels = head, torch.arange(SHAPE[1], device=device) % CLASSES

    def forward(self, x):
        return self.head.loss(x[0], self.labels)


class Peer(nn.Module):
    """The layers of the package hyper-connections, whose streams lie in the batch."""

    def __init__(self, package):
        super().__init__()
        start, self.expand, self.reduce = package.mHC.get_init_and_expand_reduce_stream_functions(4)
        self.layers = nn.ModuleList(start(dim=WIDTH, branch=nn.Identity(), layer_index=i) for i in range(CHAIN))

    def forward(self, x):
        streams = self.expand(x)
        for layer in self.layers:
            streams = layer(streams)
        return self.reduce(streams)


def layers(device):
    """(slot, name, calls of the layer in one call, module), the baseline of each slot first."""

    def chain(kind, **options):
        return CHAIN, Chain(lambda index: kind(nn.Identity(), dim=WIDTH, layer_index=index, **options))

    yield "mixer", "causal attention", 1, archs.CausalAttention(WIDTH, num_heads=2)
    yield "mixer", "Grassmann", 1, archs.CausalGrassmannMixer(WIDTH, rank=8)
    yield "residual", "plain", *chain(archs.KromHC, disable=True)
    yield "residual", "KromHC", *chain(archs.KromHC)
    yield "residual", "HC", *chain(archs.HyperConnection)
    yield "residual", "mHC-lite", *chain(archs.MHCLite)
    yield "residual", "mHC", *chain(archs.MHC)
    try:
        import hyper_connections
    except ImportError:
        print("not run: hyper-connections (PyPI) mHC is not installed")
    else:
        yield "residual", "hyper-connections (PyPI) mHC", CHAIN, Peer(hyper_connections)
    yield "ffn", "MLP", 1, archs.MLP(WIDTH, 2 * WIDTH)
    yield "ffn", "mixture of 4 experts", 1, archs.SharedMoE(WIDTH, 2 * WIDTH, num_experts=4)
    yield "head", "linear, with its loss", 1, Loss(archs.LinearHead(WIDTH, CLASSES), device)
    yield "head", "Grassmann, with its loss", 1, Loss(archs.GrassmannHead(WIDTH, CLASSES, subspace_dim=4), device)


def steps(module, device):
    """One call each way: without gradients, with, and with the backward."""
    x = torch.randn(SHAPE, device=device, requires_grad=True)

    def forward():
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    gradient = torch.ones_like(forward())

    def both():
        forward().backward(gradient)
        for tensor in (x, *module.parameters()):
            tensor.grad = None

    return {"inference": torch.no_grad()(forward), "forward": forward, "forward + backward": both}


def seconds(step, device):
    """The host's time for a call, the mean over some; the device catches up after them."""
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    found = (time.perf_counter() - start) / CALLS
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found


def measure(device, repeats):
    rows = [(slot, name, calls, steps(module.to(device), device)) for slot, name, calls, module in layers(device)]
    times = {}
    for _ in range(repeats + 1):
        for slot, name, calls, by_mode in rows:
            for mode, step in by_mode.items():
                times.setdefault((slot, name, mode), []).append(1e6 * seconds(step, device) / calls)
    shared = {"device": device.type, "threads": torch.get_num_threads(), "dtype": "float32", "shape": SHAPE, **about()}
    for slot, name, _, by_mode in rows:
        # The first repetition warms up.
        found = {mode: statistics.median(times[slot, name, mode][1:]) for mode in by_mode}
        yield {"slot": slot, "layer": name, "microseconds": found} | shared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for the JSONL; nothing is written without it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    records = []
    for record in measure(options.device, options.repeats):
        records.append(record)
        times = "  ".join(f"{mode} {value:7.1f}" for mode, value in record["microseconds"].items())
        print(f"{record['slot']:9} {record['layer']:30} {times}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"host-{options.device.type}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
