"""The C++ kernels at sizes where the libraries multiply, a chunk after the other: small cases never get there."""

import pytest
import torch

from grassland.kernels import dispatch
from grassland.kernels.cross_entropy import cases as cross_entropy
from grassland.kernels.moe import cases as moe
from grassland.kernels.plucker import cases as plucker
from grassland.kernels.subspace import cases as subspace
from grassland.kernels.testing import Case, check_backend, specs

pytestmark = pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
SPECS = {spec.name: spec for spec in specs()}
# Rows that have products of their own, and one more.
FEW = range(1, 6)
CASES = {
    "linear_cross_entropy": [
        Case("chunks", lambda: cross_entropy.head((5000,), 1700, 40, ignored=9), {"label_smoothing": 0.1}),
        Case("wide", lambda: cross_entropy.head((300,), 90, 201)),
        Case("last-chunk", lambda: cross_entropy.head((129,), 65536, 17, ignored=1)),
        Case("two-halves", lambda: cross_entropy.head((260,), 65536, 9)),
        Case("three-halves", lambda: cross_entropy.head((520,), 65536, 9)),
        Case("one-large-chunk", lambda: cross_entropy.head((140,), 65536, 150)),
    ],
    "subspace_cross_entropy": [
        Case("chunks", lambda: subspace.labelled((300,), 8200, 8, 17), {"k": 8}),
        Case("one-chunk", lambda: subspace.labelled((300,), 41, 4, 97), {"k": 4, "label_smoothing": 0.1}),
    ],
    "subspace_logits": [Case("one-chunk", lambda: subspace.head((300,), 41, 4, 97), {"k": 4, "scale": 25.0})],
    "plucker_mix": [
        Case("chunks", lambda: plucker.make(2, 1100, 33, 70), {"offsets": [1, 2, 1030]}),
        # Threads share the terms of a gradient, a chunk on top of the other.
        Case("shared-chunks", lambda: plucker.make(2, 1100, 17, 70), {"offsets": [1, 5]}),
        Case("one-chunk", lambda: plucker.make(3, 100, 17, 129), {"offsets": [3]}),
        Case("context-over-chunks", lambda: plucker.make(3, 700, 9, 30), {"offsets": [1, 300], "context": 290}),
        # As many rows as have a product of their own, and one more; not all that a tile has, and a last lane alone.
        *(
            Case(f"{n}-rows", lambda n=n: plucker.make(n, 3, 26, 83), {"offsets": [1], "context": 2})
            for n in range(1, 6)
        ),
    ],
    "gated_blend": [
        Case("rows", lambda: plucker.blend((300,), 129)),
        *(Case(f"{n}-rows", lambda n=n: plucker.blend((n,), 233)) for n in range(1, 6)),
        Case("few-rows", lambda: plucker.blend((45,), 261)),
        # More terms of a gradient than are laid out at a time.
        Case("many-rows", lambda: plucker.blend((1300,), 70)),
    ],
    "moe_ffn": [
        Case("rows", lambda: moe.make(300, 70, 97, 2)),
        # Few rows and a weight of many blocks, each with an edge, of which a product of pairs of bfloat16 is made.
        Case("few-rows", lambda: moe.make(61, 150, 586, 3)),
        Case("one-row", lambda: moe.make(2, 290, 130, 4, top_k=1)),
        Case("few-rows-odd", lambda: moe.make(45, 151, 331, 2)),
        # Whole panels of outputs, which need no way round: three and five of them.
        Case("panels", lambda: moe.make(70, 48, 80, 2)),
        # More rows than a part of a product has, experts one after the other on all threads.
        Case("many-rows", lambda: moe.make(1100, 70, 97, 1, top_k=1)),
        # Few outputs: all threads divide the rows, and the columns of a gradient.
        Case("narrow", lambda: moe.make(260, 350, 20, 1, top_k=1)),
        # More columns than a vector has lanes, with every pass there is.
        Case("dropout", lambda: moe.make(40, 37, 53, 3, seed=5), {"dropout": 0.3}),
        Case("gelu-out", lambda: moe.make(40, 37, 53, 3), {"gelu_out": True}),
        Case("gelu-out-dropout", lambda: moe.make(40, 37, 53, 3, seed=5), {"gelu_out": True, "dropout": 0.3}),
    ],
}
EVERY = [pytest.param(name, case, id=f"{name}-{case.id}") for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, case", EVERY)
def test_accuracy(name, case, dtype):
    check_backend(SPECS[name], case, "cpp", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, case", EVERY)
def test_accuracy_of_three_threads(name, case, dtype, set_threads):
    """They divide the work and share the sums; the workers of a test run have one thread."""
    set_threads(3)
    check_backend(SPECS[name], case, "cpp", dtype)
