"""Rungs 3 and 4: the Triton kernels in the interpreter, and compiled ahead of time for chips that are not here."""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grassland.kernels.cross_entropy import cases as cross_entropy
from grassland.kernels.kronecker import cases as kronecker
from grassland.kernels.moe import cases as moe
from grassland.kernels.plucker import cases as plucker
from grassland.kernels.subspace import cases as subspace
from grassland.kernels.testing import Case, Launch, normal, record_launches, resource_usage, run, specs

pytest.importorskip("triton")
SPECS = [pytest.param(spec, id=spec.name) for spec in specs() if "triton" in spec.backends]
# Shared memory that one program may use, in bytes: NVIDIA's compute capabilities 8.0, 9.0 and 10.0, AMD's MI300.
TARGETS = {"sm_80": ("cuda", 80, 32, 166912), "sm_90": ("cuda", 90, 32, 232448), "sm_100": ("cuda", 100, 32, 232448)}
AMD = ("hip", "gfx942", 64, 65536)
# Bytes of registers that a kernel keeps in memory: here one, outside of the loops.
SPILLED = {("kronecker_step", "pre_kernel", "float32", "sm_100"): 8}
# The instruction that feeds the tensor cores, by chip.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}


@pytest.mark.support(backend="triton", how="interpreted")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_interpreter(spec, dtype):
    script = Path(__file__).with_name("interpret.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script, spec.name, dtype], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == len(spec.cases)


def test_a_nan_row_routes_as_in_eager():
    """It takes experts that exist, and so no slot of another token's."""
    code = """
import torch
from grassland.kernels.moe import moe_route
logits = torch.randn(6, 4)
logits[4], logits[2, 1] = torch.nan, torch.nan
for capacity in (None, 2):
    eager, triton = (moe_route(logits, capacity=capacity, backend=b) for b in ("eager", "triton"))
    for name in ("experts", "slots", "order", "offsets", "counts"):
        assert torch.equal(getattr(triton, name), getattr(eager, name)), name
    assert torch.equal(triton.gates.isnan(), eager.gates.isnan())
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spec", SPECS)
def test_launches_on_the_device_of_the_tensors(spec, monkeypatch):
    within, guarded = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        within.append(tensor)
        yield
        within.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr("grassland.kernels.dispatch.missing", lambda *_: None)
    monkeypatch.setattr("grassland.kernels.testing.describe_launch", lambda *_: guarded.append(bool(within)))
    case = spec.cases[0]
    record_launches(lambda: run(spec, case.tensors(torch.float32), case.options, "triton"))
    assert guarded and all(guarded)


@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    [
        ("plucker_mix", lambda tokens: plucker.make(2, tokens, 32, 64), lambda _: {"offsets": [1, 2]}),
        ("gated_blend", lambda tokens: plucker.blend((tokens,), 65), None),
        ("kronecker_pre", lambda tokens: kronecker.make_pre(tokens, streams=4, dim=64), None),
        ("kronecker_post", lambda tokens: kronecker.make_post(tokens, streams=4, dim=64), None),
        ("kronecker_step", lambda tokens: kronecker.make_step(tokens, streams=4, dim=64), None),
        ("moe_route", lambda tokens: {"logits": normal(tokens, 4)}, lambda tokens: {"capacity": tokens}),
        ("moe_ffn", lambda tokens: moe.make(tokens, 64, 96, 1, top_k=1), None),
        ("subspace_logits", lambda tokens: subspace.head((tokens,), 10, 4, 32), lambda _: {"k": 4}),
        ("subspace_cross_entropy", lambda tokens: subspace.labelled((tokens,), 10, 4, 32), lambda _: {"k": 4}),
        ("linear_cross_entropy", lambda tokens: cross_entropy.head((tokens,), 100, 8), None),
    ],
)
def test_a_new_sequence_length_compiles_nothing(name, inputs, options, monkeypatch):
    """The launches of all lengths have one signature: Triton's cache key."""
    # KromHC sums its weight's gradient in as many parts as there are 256 tokens, up to a limit.
    longest = 200 if name.startswith("kronecker") else 600
    monkeypatch.setattr("grassland.kernels.dispatch.missing", lambda *_: None)
    spec = next(spec for spec in specs() if spec.name == name)

    def keys(tokens):
        case = Case("", lambda: inputs(tokens), options(tokens) if options else {})
        recorded = record_launches(lambda: run(spec, case.tensors(torch.float32), case.options, "triton"))
        return [(x.name, x.signature, x.constexprs, x.attributes) for x in recorded]

    assert keys(1) == keys(64) == keys(77) == keys(longest)


def test_rows_of_any_number_have_one_grid_axis(monkeypatch):
    """The others end at 65,535 programs."""
    from triton.runtime.jit import JITFunction

    from grassland.kernels.moe import fused

    grids = []
    monkeypatch.setattr(JITFunction, "run", lambda *_, grid, **__: grids.append(grid))
    x, out = (torch.empty(1 << 22, width, device="meta") for width in (8, 96))
    index = torch.empty(1 << 22, dtype=torch.int64, device="meta")
    fused.grouped(x, torch.empty(4, 96, 8, device="meta"), None, index, index[:5], 2, out)
    assert len(grids) == 1 and max(grids[0][1:], default=1) < 1 << 16


def test_no_thread_reads_what_another_has_written():
    """Programs of several warps read their logits, and none of the experts that they have stored."""
    from grassland.kernels.moe import fused_route

    recorded = record_launches(lambda: fused_route.route(torch.zeros(300, 64), None, 1, -1, True))
    (choose,) = [launch for launch in recorded if launch.name == "choose_kernel"]
    assert choose.compile(*TARGETS["sm_90"][:3]).asm["ttgir"].count("tt.load") == 1


def test_many_experts_are_routed_as_in_eager():
    """In more blocks of tokens than one tile of the scan holds."""
    code = """
import torch
from grassland.kernels.moe import moe_route
for capacity in (None, 3):
    logits = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    eager, triton = (moe_route(logits, top_k=4, capacity=capacity, backend=b) for b in ("eager", "triton"))
    for name in ("experts", "slots", "order", "offsets", "counts"):
        assert torch.equal(getattr(triton, name), getattr(eager, name)), name
    torch.testing.assert_close((triton.gates, triton.balance), (eager.gates, eager.balance))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("experts", [32, 64])
def test_routing_to_many_experts_does_not_spill(experts, monkeypatch):
    monkeypatch.setattr("grassland.kernels.dispatch.missing", lambda *_: None)
    spec = next(spec for spec in specs() if spec.name == "moe_route")
    case = Case("", lambda: {"logits": normal(300, experts)}, {"top_k": 6})
    for launch in record_launches(lambda: run(spec, case.tensors(torch.float32), case.options, "triton")):
        compiled(launch, "sm_90")


@functools.cache
def launches(name: str, dtype: torch.dtype, limit: int) -> list[Launch]:
    """Every launch of forward and backward at a realistic shape, on a chip with that much shared memory. The recorder
    stands in for the GPU."""
    spec = next(spec for spec in specs() if spec.name == name)
    case = spec.representative
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grassland.kernels.dispatch.missing", lambda *_: None)
        patch.setattr("grassland.kernels.kronecker.fused.shared_memory", lambda _: limit)
        return record_launches(lambda: run(spec, case.tensors(dtype), case.options, "triton"))


def compiled(launch: Launch, chip: str, spilled: int = 0):
    """For a chip, within its shared memory, with at most `spilled` bytes of registers in memory."""
    backend, arch, warp, limit = TARGETS[chip]
    found = launch.compile(backend, arch, warp)
    assert found.metadata.shared <= limit, launch.name
    usage = resource_usage(found.asm["cubin"])
    assert usage["LOCAL"] == 0 and usage["STACK"] <= spilled, f"{launch.name} spills: {usage}"
    return found


@pytest.mark.support(backend="triton", how="compiled")
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_for_nvidia(spec, dtype, chip):
    recorded = launches(spec.name, getattr(torch, dtype), TARGETS[chip][3])
    assert recorded
    assembly = ""
    for launch in recorded:
        spilled = SPILLED.get((spec.name, launch.name, dtype, chip), 0)
        assembly += compiled(launch, chip, spilled).asm["ptx"]
    assert not spec.gemm or dtype == "float32" or MATRIX[chip] in assembly


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("spec", SPECS)
def test_float16_compiles_for_nvidia(spec, chip):
    for launch in launches(spec.name, torch.float16, TARGETS[chip][3]):
        compiled(launch, chip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("arch", "limit"), [(80, 166912), (89, 101376), (120, 101376), (90, 232448)])
def test_eight_streams_fit_a_chips_shared_memory(arch, limit, dtype, monkeypatch):
    monkeypatch.setattr("grassland.kernels.dispatch.missing", lambda *_: None)
    monkeypatch.setattr("grassland.kernels.kronecker.fused.shared_memory", lambda _: limit, raising=False)
    for name, make in (("kronecker_pre", kronecker.make_pre), ("kronecker_step", kronecker.make_step)):
        spec, case = (
            next(s for s in specs() if s.name == name),
            Case("", functools.partial(make, 64, streams=8, dim=256)),
        )
        recorded = record_launches(lambda spec=spec, case=case: run(spec, case.tensors(dtype), case.options, "triton"))
        (launch,) = [launch for launch in recorded if launch.name == "pre_kernel"]
        assert launch.compile("cuda", arch, 32).metadata.shared <= limit


@pytest.mark.support(backend="triton", how="compiled", dtype="bfloat16")
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_for_amd(spec):
    for launch in launches(spec.name, torch.bfloat16, AMD[3]):
        assert launch.compile(*AMD[:3]).metadata.shared <= AMD[3], launch.name
