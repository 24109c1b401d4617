"""The rivals that are other people's packages: what is listed where they cannot run, and what they are held to."""

import importlib
import json
import re
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from grassland.kernels import dispatch
from grassland.kernels.bench import command, rival, setup
from grassland.kernels.bench import kronecker_gpu as mhc
from grassland.kernels.bench.kronecker import mhc_layer
from grassland.kernels.bench.rival import Benchmark, Rival, Setting, Unavailable, package, tensors, with_gradients

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_A_GPU = {
    "plucker": ("flash-attn sublayer", "gated linear attention (fla)", "Mamba-2 (fla)"),
    "kronecker": ("LigerMHC", "TransformerEngine mHC", "TileKernels mHC"),
    "subspace": ("Liger fused linear cross entropy",),
    "moe": ("ScatterMoE", "SonicMoE, SwiGLU of equal FLOPs", "triton_kernels"),
    "cross_entropy": ("Liger fused linear cross entropy", "cut-cross-entropy"),
}
SEQUENCE = {"batch": 2, "length": 24, "dim": 128, "rank": 8, "offsets": [1, 2]}
STREAMS = {"kind": "sublayer", "tokens": 24, "streams": 4, "dim": 40}
PAIRS = {"tokens": 20, "experts": 4, "calls": 1, "dim": 32, "inner": 48, "top_k": 2}


def benchmark_of(op):
    return importlib.import_module(f"grassland.kernels.bench.{op}").BENCHMARK


@pytest.mark.parametrize("op", dispatch.PACKAGES)
def test_every_rival_on_a_gpu_is_listed(op):
    """On a CPU each says what it needs, in the settings that it is for, and nothing in the others."""
    benchmark = benchmark_of(op)
    rivals = [r for r in benchmark.rivals if r.name in ON_A_GPU[op]]
    assert tuple(r.name for r in rivals) == ON_A_GPU[op] and all(r.foreign for r in rivals)
    listed = set()
    for setting in benchmark.settings:
        steps, reasons = setup.build(replace(benchmark, rivals=rivals), setting, torch.bfloat16, CPU)
        assert not any(steps.values()) and set(reasons.values()) <= {"needs an NVIDIA GPU"}
        assert setting.values.get("kind") not in ("model", "step") or not reasons
        listed |= reasons.keys()
    assert listed == set(ON_A_GPU[op])


def test_a_package_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "has_no_driver.py").write_text("raise RuntimeError('no | driver\\nat all')")
    (tmp_path / "lacks_another.py").write_text("import not_there_either")
    for name, device, reason in [
        ("not_there.layers", GPU, "not_there is not installed: pip install x"),
        ("has_no_driver", GPU, "has_no_driver does not import (RuntimeError: no / driver): pip install x"),
        ("lacks_another", None, "lacks_another does not import (ModuleNotFoundError: No module named"),
        ("json", CPU, "needs an NVIDIA GPU"),
    ]:
        with pytest.raises(Unavailable, match=f"^{re.escape(reason)}"):
            package(name, "x", device)
    assert package("json", "x", GPU) is json


def test_records_name_the_packages_of_rivals(monkeypatch):
    monkeypatch.setattr(rival, "_imported", set())
    assert rival.packages() == {}
    package("einops.layers", "einops")
    package("json", "x")  # part of Python: of no distribution
    assert rival.packages() == {"einops": metadata.version("einops")}


def test_a_foreign_rival_that_fails_or_disagrees_is_listed(monkeypatch):
    """The others are timed; a rival of ours that disagrees stops everything (test_benchmarks)."""

    def ours(v, dtype, device):
        x = torch.arange(1.0, 4.0).requires_grad_()
        return with_gradients(lambda x: v.get("factor", 1) * x.square(), [x])

    def wrong(v, dtype, device):
        return ours({"factor": 2}, dtype, device)

    def failing(v, dtype, device):
        return {"forward": lambda: torch.zeros(2) + torch.zeros(3)}

    rivals = [Rival("ours", ours), Rival("wrong", wrong, foreign=True), Rival("failing", failing, foreign=True)]
    fields = {"ours": "ours", "settings": [], "rivals": rivals, "flops": lambda *_: 1.0, "moved": lambda *_: 1.0}
    options = SimpleNamespace(dtype="float32", device="cpu", repeats=1, setup_limit=0.0)
    records = command.measure(Benchmark(name="x", title="x", **fields), Setting("s", {}), options)
    assert {r["rival"] for r in records if "ms" in r} == {"ours"}
    reasons = {r["rival"]: r["error"] for r in records if "error" in r}
    assert reasons["wrong"] == "differs from ours by 1.0e+00"
    assert reasons["failing"].startswith("fails with RuntimeError: The size of tensor a (2) must match")


def ours_of(name, x, phi, bias, scales):
    """grassland's mHC with the arguments of a truth. Theirs, but Liger's, apply the transpose of what they have."""
    n, dim = STREAMS["streams"], STREAMS["dim"]
    if name == "transformer_engine":
        x, phi, bias = x.mT, phi.unflatten(-1, (dim, n)).mT.flatten(-2), bias[0]
    columns = (phi if name == "liger" else phi.T) * scales.repeat_interleave(torch.tensor([n, n, n * n]))
    pre, post, mixing = columns.split((n, n, n * n), -1)
    b_pre, b_post, b_mixing = bias.split((n, n, n * n))
    if name != "liger":
        mixing, b_mixing = (t.unflatten(-1, (n, n)).mT.flatten(-2) for t in (mixing, b_mixing))
    gamma = x.new_zeros(n * dim)
    y = mhc_layer(x, gamma, torch.cat([pre, mixing], 1), post, torch.cat([b_pre, b_mixing]), b_post)
    return y.mT if name == "transformer_engine" else y


@pytest.mark.parametrize("name", ["liger", "tile_kernels", "transformer_engine"])
def test_the_mhc_of_a_package_is_ours(name):
    """What it is held to, against the layer of grassland.archs."""
    x = mhc.streams(STREAMS, torch.float64, CPU).detach()
    phi, bias, _ = (t.detach().double() for t in mhc.coefficients(STREAMS, CPU))
    scales = torch.tensor([0.7, 1.3, 0.9], dtype=torch.float64)
    if name == "transformer_engine":
        x, bias = x.movedim(0, 1).mT.contiguous(), bias[None]
    phi = phi.T if name == "liger" else phi
    found = getattr(mhc, f"{name}_truth")(x, phi, bias, *(scales if name == "liger" else [scales]))
    # A small constant under one root and not under the other.
    assert setup.disagreement(found, ours_of(name, x, phi, bias, scales)) < 1e-6


def attention(q, k, v, causal):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later & causal, -torch.inf).softmax(-1), v)


def ragged_product(a, b, bias, a_ragged_metadata, precision_config, gather_indx=None, scatter_indx=None, gammas=None):
    rows = a if gather_indx is None else a[gather_indx]
    parts = zip(rows.split(a_ragged_metadata), b, bias, strict=True)
    y = torch.cat([part.float() @ w.float() + shift for part, w, shift in parts])
    y = (y if gammas is None else y * gammas[:, None]).to(a.dtype)
    return y if scatter_indx is None else torch.empty_like(y).index_copy(0, scatter_indx.long(), y)


def gated_layer(x, router, w1, b1, w2, b2, k, stream, kind, is_inference_mode_enabled, is_softmax_over_topk):
    gates, experts = F.linear(x, router).softmax(-1, dtype=torch.float32).topk(k)
    assert kind == "swiglu" and not is_softmax_over_topk
    h = torch.einsum("th,ihe->tei", x, w1) + b1
    y = torch.einsum("tei,hie->teh", h[..., 1::2] * F.silu(h[..., ::2]), w2) + b2
    return ((y.gather(1, experts[..., None].expand(-1, -1, x.shape[1])) * gates[..., None]).sum(1).to(x.dtype),)


def streams_in(x, fn, scale, base, pre_eps, post_mult_value, sinkhorn_repeat):
    n, flat = x.shape[-2], x.flatten(-2).float()
    mixes = flat @ fn.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    mixes = mixes * torch.cat([s.expand(k) for s, k in zip(scale, (n, n, n * n), strict=True)]) + base
    comb = mixes[..., 2 * n :].unflatten(-1, (n, n)).exp()
    for _ in range(sinkhorn_repeat):
        comb = comb / comb.sum(-1, keepdim=True)
        comb = comb / comb.sum(-2, keepdim=True)
    u = ((mixes[..., :n].sigmoid() + pre_eps).unsqueeze(-1) * x).sum(-2).to(x.dtype)
    return u, (mixes[..., n : 2 * n].sigmoid().unsqueeze(-1) * post_mult_value, comb)


def streams_out(u, residual, post, comb):
    mixed = torch.einsum("abmn,abmc->abnc", comb, residual.float())
    return (u.float().unsqueeze(-2) * post + mixed).to(residual.dtype)


# What the packages' documentation says of the functions that the rivals call, for those that no interpreter runs here.
STAND_INS = {
    "flash_attn": SimpleNamespace(flash_attn_func=attention),
    "triton_kernels.matmul": SimpleNamespace(matmul=ragged_product, PrecisionConfig=lambda allow_tf32: None),
    "triton_kernels.tensor": SimpleNamespace(make_ragged_tensor_metadata=lambda counts, rows: counts.tolist()),
    "sonicmoe": SimpleNamespace(moe_TC_softmax_topk_layer=gated_layer),
    "sonicmoe.enums": SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu")),
    "tile_kernels.modeling.mhc.functional": SimpleNamespace(mhc_pre=streams_in, mhc_post=streams_out),
}


@pytest.mark.parametrize(
    ("op", "name", "values"),
    [
        ("plucker", "flash-attn sublayer", SEQUENCE),
        ("kronecker", "TileKernels mHC", STREAMS),
        ("moe", "SonicMoE, SwiGLU of equal FLOPs", PAIRS),
        ("moe", "triton_kernels", PAIRS),
    ],
)
def test_a_rival_gives_its_package_what_that_documents(monkeypatch, op, name, values):
    """Its own code around a stand-in, which computes in PyTorch what the package documents, against its truth."""
    for module in ("plucker", "kronecker_gpu", "moe_gpu"):
        target = importlib.import_module(f"grassland.kernels.bench.{module}")
        monkeypatch.setattr(target, "package", lambda package, *_: STAND_INS[package])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    benchmark = benchmark_of(op)
    chosen = replace(benchmark, rivals=[r for r in benchmark.rivals if r.name == name])
    steps, reasons = setup.build(chosen, Setting("tiny", values), torch.bfloat16, CPU)
    assert reasons == {} and {"forward", "check", "truth"} <= steps[name].keys()
    assert setup.agreement(chosen, steps, torch.bfloat16) == {}
    steps[name]["check"], right = lambda: [-t for t in tensors(right())], steps[name]["check"]
    assert setup.agreement(chosen, steps, torch.bfloat16).keys() == {name}
