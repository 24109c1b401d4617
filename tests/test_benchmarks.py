"""The benchmark harness on a tiny problem, and the tables that are made from its files."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grassland.kernels import dispatch, machine
from grassland.kernels.bench import command, setup, timing
from grassland.kernels.bench.report import regressions, uncompared
from grassland.kernels.bench.rival import Disagreement, Rival, Setting, Unavailable, with_gradients

ROOT = Path(__file__).parents[1]
TINY = Setting("tiny", {"batch": 1, "length": 24, "dim": 64, "rank": 8, "offsets": [1, 2]})


def missing(*_):
    raise Unavailable("it is not installed")


@pytest.fixture
def tiny(monkeypatch):
    """The plucker benchmark on a tiny setting, without the rivals that compile or are foreign, and an absent one."""
    module = importlib.import_module("grassland.kernels.bench.plucker")
    if dispatch.extension_error():
        pytest.skip(dispatch.extension_error())
    rivals = [r for r in module.BENCHMARK.rivals if "compile" not in r.name and not r.foreign]
    rivals.append(Rival("absent", missing))
    monkeypatch.setattr(module, "BENCHMARK", replace(module.BENCHMARK, settings=[TINY], rivals=rivals))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return module.BENCHMARK


def test_records_table_and_picture(tiny, tmp_path, capsys):
    records = command.main(["plucker", "--repeats", "2", "--out", str(tmp_path)])
    timed = [r for r in records if "error" not in r]
    names = {r.name for r in tiny.rivals} - {"absent", "grassland, Triton"}
    assert {(r["rival"], r["mode"]) for r in timed} == {(n, m) for n in names for m in ("forward", "forward+backward")}
    assert all(r["ratio"] == 1 for r in timed if r["rival"] == tiny.ours)
    both = {r["rival"]: r for r in timed if r["mode"] == "forward+backward"}
    assert both["literal eager"]["saved_bytes"] > both["grassland"]["saved_bytes"]
    assert "not run: it is not installed" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "plucker-cpu-float32.jsonl").read_text().splitlines()]
    assert len(written) == len(records) and {"cpu", "torch", "commit", "threads"} <= written[0].keys()
    for picture in ("plucker-cpu-float32.png", "plucker-cpu-float32-roofline.png"):
        assert (tmp_path / picture).stat().st_size > 1000
    assert written[0]["peak_gflops"] > 0 and written[0]["peak_gbytes"] > 0


def test_rivals_that_disagree_are_not_timed(tiny, monkeypatch):
    module = importlib.import_module("grassland.kernels.bench.plucker")

    def wrong(v, dtype, device):
        steps = module.build_collapsed(v, dtype, device)
        return steps | {"check": lambda: [2 * t for t in steps["check"]()]}

    monkeypatch.setattr(module, "BENCHMARK", replace(tiny, rivals=[*tiny.rivals, Rival("wrong", wrong)]))
    with pytest.raises(SystemExit, match=r"wrong and grassland differ by 1\.0e\+00: nothing was timed"):
        command.main(["plucker", "--repeats", "1"])


def test_a_gradient_that_is_not_a_number_is_a_disagreement():
    one, odd = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for found in ((odd, one, one), (one, odd, one), (one, one, odd)):
        steps = {"ours": {"check": lambda: (one, one, one)}, "other": {"check": lambda found=found: found}}
        for foreign in (False, True):
            rivals = [SimpleNamespace(name="ours", foreign=False), SimpleNamespace(name="other", foreign=foreign)]
            benchmark = SimpleNamespace(name="b", ours="ours", rivals=rivals, tolerance={torch.float32: 1e-4})
            if foreign:
                assert setup.agreement(benchmark, steps, torch.float32) == {"other": "differs from ours by nan"}
                continue
            with pytest.raises(Disagreement, match="other and ours differ by nan"):
                setup.agreement(benchmark, steps, torch.float32)


@pytest.mark.parametrize("op", dispatch.PACKAGES)
def test_what_is_ours_is_never_a_fallback(op, monkeypatch):
    """Where the compiled kernels are missing or not asked for, nothing is timed under their name."""
    module = importlib.import_module(f"grassland.kernels.bench.{op}")
    first = module.BENCHMARK.settings[0]
    small = {"tokens": 24, "batch": 2, "length": 24, "classes": 3, "k": 2, "n": 8, "dim": 16, "rank": 4, "vocab": 30}
    values = {name: small.get(name, value) for name, value in first.values.items()}
    ours = [rival for rival in module.BENCHMARK.rivals if rival.name == module.BENCHMARK.ours]
    tiny = replace(module.BENCHMARK, settings=[replace(first, values=values)], rivals=ours)
    monkeypatch.setattr(module, "BENCHMARK", tiny)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "extension_error", lambda: "it is not built")
        with pytest.raises(SystemExit, match="backend 'cpp' is not available: it is not built: nothing was timed"):
            command.main([op, "--device", "cpu", "--repeats", "1"])
    monkeypatch.setenv("GRASSLAND_BACKEND", "eager")
    with pytest.raises(SystemExit, match=r"unset \$GRASSLAND_BACKEND"):
        command.main([op, "--device", "cpu", "--repeats", "1"])


def test_chosen_rivals(tiny):
    records = command.main(["plucker", "--repeats", "1", "--rival", "literal eager"])
    assert {r["rival"] for r in records} == {"grassland", "literal eager"}
    with pytest.raises(SystemExit, match=r"--rival must be one of grassland, .*, got nobody"):
        command.main(["plucker", "--rival", "nobody"])


def test_what_is_measured_is_written_before_the_next_setting(tiny, tmp_path, monkeypatch):
    first, measure, calls = tiny.settings[0], command.measure, []

    def second_fails(benchmark, setting, options):
        calls.append(setting)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(benchmark, setting, options)

    module = importlib.import_module("grassland.kernels.bench.plucker")
    monkeypatch.setattr(module, "BENCHMARK", replace(tiny, settings=[first, replace(first, id="later")]))
    monkeypatch.setattr(command, "measure", second_fails)
    with pytest.raises(KeyboardInterrupt):
        command.main(["plucker", "--repeats", "1", "--rival", "literal eager", "--out", str(tmp_path)])
    written = (tmp_path / "plucker-cpu-float32.jsonl").read_text().splitlines()
    assert {json.loads(line)["setting"] for line in written} == {first.id}


def test_a_slow_rival_repeats_no_more(monkeypatch):
    cpu = torch.device("cpu")
    assert len(timing.interleaved({"x": lambda: None}, cpu, 7)["x"]) == 7
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    assert len(timing.interleaved({"x": lambda: None}, cpu, 7)["x"]) == 1


def test_kernels_of_a_call_are_added_up(monkeypatch):
    def event(name, device, microseconds):
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: microseconds)
        )

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            gpu = [event("short", "DeviceType.CUDA", 1.0), event("long", "DeviceType.CUDA", 4.0)]
            return 2 * [*gpu, event("short", "DeviceType.CUDA", 2.0), event("launch", "DeviceType.CPU", 9.0)]

    steps = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert timing.by_kernel(lambda: steps.append(None), calls=2) == [("long", 1.0, 4.0), ("short", 2.0, 3.0)]
    assert len(steps) == 3  # one before the profile


def test_unknown_setting_names_itself(tiny):
    with pytest.raises(SystemExit, match="--setting must be one of tiny, got huge"):
        command.main(["plucker", "--setting", "huge"])


def test_all_ops_by_one_command_and_scaling(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(command.SCALING, "plucker", ("tiny", "length", (8, 16)))
    records = command.main(
        ["all", "--repeats", "1", "--scaling", "--setting", "tiny, length 8", "--out", str(tmp_path)]
    )
    assert {(r["bench"], r["setting"], r["length"]) for r in records} == {("plucker", "tiny, length 8", 8)}
    assert (tmp_path / "plucker-cpu-float32-scaling.png").stat().st_size > 1000
    for op in dispatch.PACKAGES:
        benchmark = importlib.import_module(f"grassland.kernels.bench.{op}").BENCHMARK
        name = command.SCALING[op][1]
        sizes = [s.values[name] for s in command.scaled(benchmark)]
        assert sizes == sorted(set(sizes)) and name in benchmark.settings[0].values


def timed(rival, ratio, setting="s"):
    return {"bench": "b", "setting": setting, "dtype": "float32", "mode": "forward", "rival": rival, "ratio": ratio}


def test_a_shrunken_lead_is_a_regression():
    before = [timed("ours", 1.0), timed("slow", 4.0), timed("fast", 0.5), timed("gone", 2.0), {"error": "x"}]
    now = [timed("ours", 1.0), timed("slow", 3.6), timed("fast", 0.5), timed("new", 0.1)]
    assert regressions(now, before, {"ours"}) == []
    lines = regressions([timed("ours", 1.0), timed("slow", 3.4), timed("fast", 0.4)], before, {"ours"})
    assert lines == [
        "regression: cpu | b | s | float32 | forward | slow: time / ours 4.000 -> 3.400, 1.18x slower",
        "regression: cpu | b | s | float32 | forward | fast: time / ours 0.500 -> 0.400, 1.25x slower",
    ]


def test_a_baseline_that_tells_nothing_is_refused():
    """Of another setting, of another device, or of ours alone: its ratio is 1 in every run."""
    now = [timed("ours", 1.0), timed("slow", 4.0)]
    on_gpu = [r | {"graph": True} for r in now]
    for before in ([timed("slow", 4.0, "other")], now[:1], on_gpu, [r | {"device": "cuda"} for r in now]):
        with pytest.raises(ValueError, match="no device, setting, mode and rival in common"):
            regressions(now, before, {"ours"})


def test_what_a_comparison_says_nothing_of_is_told():
    before = [timed("ours", 1.0), timed("slow", 4.0), timed("gone", 2.0), timed("slow", 3.0, "other")]
    now = [timed("ours", 1.0), timed("slow", 4.0), timed("new", 2.0)]
    assert uncompared(now, before, {"ours"}) == [
        "not in this run: cpu | b | s | float32 | forward | gone",
        "not in the baseline: cpu | b | s | float32 | forward | new",
        "not in this run: cpu | b | other | float32",
    ]
    here, there = ([r | {"cpu": cpu, "threads": 2, "gpus": []} for r in now] for cpu in ("A", "B"))
    assert uncompared(here, there, {"ours"}) == ["another machine: the baseline is of B, 2, [], this run of A, 2, []"]
    assert uncompared(here, here, {"ours"}) == []


@pytest.mark.parametrize(("factor", "code"), [(1e-3, None), (1e3, 1)])
def test_baseline_decides_the_exit_code(tiny, tmp_path, capsys, factor, code):
    records = command.main(["plucker", "--repeats", "1"])
    path = tmp_path / "baseline.jsonl"
    changed = [r | {"ratio": r["ratio"] * (factor if r["rival"] != tiny.ours else 1)} for r in records if "ratio" in r]
    path.write_text("".join(json.dumps(r) + "\n" for r in changed))
    if code is None:
        command.main(["plucker", "--repeats", "1", "--baseline", str(path)])
        assert "no regression" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        command.main(["plucker", "--repeats", "1", "--baseline", str(path)])
    assert stop.value.code == code and "regression: cpu | plucker | tiny" in capsys.readouterr().out


def test_an_unreadable_baseline_names_itself(tiny, tmp_path):
    path = tmp_path / "baseline.jsonl"
    path.write_text("{")
    with pytest.raises(SystemExit, match=r"baseline\.jsonl: not a benchmark's JSONL"):
        command.main(["plucker", "--baseline", str(path)])


def test_readme_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_processors_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == (machine.platform.processor() or machine.platform.machine())
    core = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    machine.CPU_INFO.write_text(f"{core}\n{core.replace('17', '2')}\n")
    assert machine.cpu_name() == "AMD EPYC, family 25 model 17"
    machine.CPU_INFO.write_text("processor\t: 0\nmodel name\t: Neoverse\n")
    assert machine.cpu_name() == "Neoverse"


def lent_machine(tmp_path, *stages):
    """benchmarks/gpu.sh where no program runs, no time is left and no data lies."""
    python = tmp_path / "bin/python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    folders = {"OUT": tmp_path / "out", "RESULTS": tmp_path / "results", "DATA": tmp_path / "none"}
    known = os.environ | {name: str(folder) for name, folder in folders.items()} | {"LIMIT": "0", "PACK_S": "0.1"}
    known["PATH"] = f"{python.parent}:{known['PATH']}"
    command = ["bash", ROOT / "benchmarks/gpu.sh", *stages]
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=60)


def test_gpu_script_without_data_leaves_out_the_comparison(tmp_path):
    done = lent_machine(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"compare needs {tmp_path / 'none'}/wikitext-2: set DATA" in done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith("no time for ")]
    assert [line.split()[-1] for line in left_out] == ["install", "tests", "bench", "sanitizer", "scaling", "profile"]
    assert (tmp_path / "out/results.tgz").exists()


def test_gpu_script_refuses_a_comparison_that_was_asked_for_and_has_no_data(tmp_path):
    done = lent_machine(tmp_path, "tests", "compare")
    assert done.returncode == 2 and "or leave compare out" in done.stderr and done.stdout == ""


def test_a_rival_is_held_to_its_own_truth(tiny, monkeypatch):
    """A rival of other mathematics is compared with that in float64, not with ours."""
    module = importlib.import_module("grassland.kernels.bench.plucker")

    def other(v, dtype, device):
        x = torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        return with_gradients(torch.sin, [x], torch.cos if v.get("wrong") else torch.sin)

    for wrong in (False, True):
        setting = replace(TINY, values={**TINY.values, "wrong": wrong})
        changed = replace(tiny, rivals=[*tiny.rivals, Rival("other", other)], settings=[setting])
        monkeypatch.setattr(module, "BENCHMARK", changed)
        if wrong:
            with pytest.raises(SystemExit, match="other and other in float64 differ by"):
                command.main(["plucker", "--repeats", "1"])
        else:
            assert "other" in {r["rival"] for r in command.main(["plucker", "--repeats", "1"])}


def test_the_truth_gets_the_same_gradients_wherever_it_is_asked_for(monkeypatch):
    """A benchmark on a GPU builds rivals with another default device, and other random numbers, than it checks with."""
    x = torch.randn(3, requires_grad=True)
    modes = with_gradients(lambda x: x.square(), [x], lambda x: x.square())
    monkeypatch.setattr("grassland.kernels.bench.rival.normal", lambda *shape, seed: torch.zeros(shape))
    found, exact = modes["check"](), modes["truth"]()
    assert exact[1].abs().sum() > 0 and all(torch.allclose(a.double(), b) for a, b in zip(found, exact, strict=True))


def test_a_foreign_rival_that_works_once_is_listed_with_the_reason(tiny, monkeypatch):
    """As a backward that overwrites what it has saved."""
    module = importlib.import_module("grassland.kernels.bench.plucker")

    def once(v, dtype, device):
        calls = iter([None])

        def step():
            if next(calls, "no") == "no":
                raise RuntimeError("modified by an inplace operation")

        return {"forward": step}

    rivals = [*tiny.rivals, Rival("other", once, foreign=True)]
    monkeypatch.setattr(module, "BENCHMARK", replace(tiny, rivals=rivals))
    found = [r for r in command.main(["plucker", "--repeats", "1"]) if r["rival"] == "other"]
    assert [r["error"] for r in found] == ["fails with RuntimeError: modified by an inplace operation"]


@pytest.mark.parametrize("wrapped", [None, True, False], ids=["raised", "wrapped", "swallowed"])
def test_a_rival_that_takes_too_long_to_set_up_is_left_out(tiny, monkeypatch, wrapped):
    """Compilers raise something else in its place, or fall back."""
    module = importlib.import_module("grassland.kernels.bench.plucker")

    def slow(v, dtype, device):
        try:
            while True:
                time.sleep(0.01)
        except Unavailable as error:
            if wrapped is None:
                raise
            if wrapped:
                raise RuntimeError("backend raised") from error
            return {"forward": lambda: None}

    monkeypatch.setattr(module, "BENCHMARK", replace(tiny, rivals=[*tiny.rivals, Rival("slow", slow)]))
    found = command.main(["plucker", "--repeats", "1", "--setup-limit", "0.5"])
    assert [r["error"] for r in found if r["rival"] == "slow"] == ["not set up within 0.5 s"]
    assert "ms" in next(r for r in found if r["rival"] == "grassland")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_hyper_connection_rival_is_checked(dtype):
    """All but the copy: KromHC's against float64 and each other, every mHC against its own equations."""
    if dispatch.extension_error():
        pytest.skip(dispatch.extension_error())
    module = importlib.import_module("grassland.kernels.bench.kronecker")
    setting = Setting("tiny", {"kind": "sublayer", "tokens": 24, "streams": 4, "dim": 40})
    rivals = [r for r in module.BENCHMARK.rivals if "compile" not in r.name]
    benchmark = replace(module.BENCHMARK, rivals=rivals)
    steps, absent = setup.build(benchmark, setting, getattr(torch, dtype), torch.device("cpu"))
    unchecked = {name for name, modes in steps.items() if modes and "check" not in modes}
    assert unchecked == {"copy of the same bytes"} and set(absent) <= {r.name for r in rivals if r.foreign}
    assert {name for name, modes in steps.items() if "truth" in modes} >= {"grassland, boundary-fused", "mHC, eager"}
    assert setup.agreement(benchmark, steps, getattr(torch, dtype)) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mixture_of_experts_rival_is_checked(dtype):
    """Those that drop pairs beyond the capacity, too: against the same in float64."""
    if dispatch.extension_error():
        pytest.skip(dispatch.extension_error())
    module = importlib.import_module("grassland.kernels.bench.moe")
    values = {"tokens": 40, "experts": 16, "calls": 1, "dim": 32, "inner": 64, "top_k": 2}
    chosen = module.choice(*module.inputs(values, getattr(torch, dtype), torch.device("cpu"))[:2], 2)[1]
    assert chosen.flatten().bincount().max() > module.expert_capacity(40, 16, 2, 1.2)  # else nothing is dropped
    rivals = [r for r in module.BENCHMARK.rivals if "compile" not in r.name]
    benchmark, cpu = replace(module.BENCHMARK, rivals=rivals), torch.device("cpu")
    steps, _ = setup.build(benchmark, Setting("tiny", values), getattr(torch, dtype), cpu)
    assert {name for name, modes in steps.items() if "check" not in modes} == {"dense FFN, equal FLOPs"}
    assert {name for name, modes in steps.items() if "truth" in modes} == {"padded baddbmm", "one-hot einsum"}
    assert setup.agreement(benchmark, steps, getattr(torch, dtype)) == {}


def test_compilers_are_given_whole_graphs():
    """A break, as at a bincount, is a form that nobody would compile."""
    dynamo = importlib.import_module("torch._dynamo")
    kronecker, plucker, subspace, cross_entropy, moe = (
        importlib.import_module(f"grassland.kernels.bench.{op}")
        for op in ("kronecker", "plucker", "subspace", "cross_entropy", "moe")
    )
    cpu, kind = torch.device("cpu"), torch.bfloat16
    streams = {"tokens": 24, "streams": 4, "dim": 40}
    sizes = {"tokens": 8, "experts": 4, "dim": 16, "inner": 24, "top_k": 2}
    mixer = plucker.mixer(plucker.eager.plucker_mix, plucker.eager_blend, TINY.values)
    head = subspace.head_inputs({"classes": 10, "k": 2, "n": 16, "batch": 8}, kind, cpu)
    # Which dtypes of the grouped product itself can be traced is a matter of torch's version.
    experts = moe.grouped_layer(sizes, lambda a, b, offs: a @ b[0] * offs[-1])
    for function, arguments in (
        (kronecker.sublayer(kronecker.kromhc_matrix), kronecker.inputs(streams, kind, cpu, 4)),
        (kronecker.sublayer(kronecker.mhc_matrix), kronecker.inputs(streams, kind, cpu, 16)),
        (mixer, plucker.inputs(TINY.values, kind, cpu)),
        (subspace.composed_loss, (*head, 2)),
        (cross_entropy.whole, cross_entropy.inputs({"tokens": 8, "vocab": 50, "dim": 16}, kind, cpu)),
        (experts, moe.inputs(sizes, kind, cpu)),
    ):
        dynamo.reset()
        assert dynamo.explain(function)(*arguments).graph_break_count == 0


def test_training_step_begins_as_the_plain_network():
    module = importlib.import_module("grassland.kernels.bench.kronecker")
    setting = Setting("tiny", {"kind": "model", "batch": 1, "length": 8, "depth": 6, "dim": 384})
    rivals = [r for r in module.BENCHMARK.rivals if "compile" not in r.name]
    steps, _ = setup.build(replace(module.BENCHMARK, rivals=rivals), setting, torch.float32, torch.device("cpu"))
    ours, plain = steps.pop("grassland"), steps.pop("plain residual")
    assert not any(steps.values())
    first = ours["check"]().item()
    assert first == pytest.approx(plain["check"]().item(), rel=1e-5)
    for modes in (ours, plain):
        modes["training step"]()
        assert modes["check"]().item() < first


def test_tables_show_settings_that_rivals_do_not_share(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    facts = {"gpus": [], "cpu": "c", "cpu_capability": "a", "threads": 2, "dtype": "float32", "torch": "2"}
    timed = [("grassland", "a", 1.0), ("other", "a", 1.5), ("grassland", "b", 1.0), ("plain", "b", 0.9)]
    records = [{"rival": r, "setting": s, "mode": "step", "ms": 5.0, "ratio": ratio} for r, s, ratio in timed]
    records.append({"rival": "absent", "setting": "a", "error": "no wheel"})
    records.append({"rival": "plain", "setting": "a", "error": "too large"})
    path = tmp_path / "kernels/machine/x-cpu-float32.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps(r | facts) for r in records))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = tables.kernel_table("x").splitlines()
    assert "| other | 1.50 |  |" in rows and "| plain | not run: too large | 0.90 |" in rows
    assert rows[-1].startswith("Not run: absent (no wheel). c (a), 2 threads")


def test_peak_memory_on_the_cpu():
    def step():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b + 1

    # Two of the three tensors at a time, and scalars.
    assert 2 <= timing.peak_bytes(step, torch.device("cpu")) / (4 << 20) < 2.01


def test_the_decoding_benchmark_tells_states_that_grow(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "benchmarks/decode.py", "--repeats", "1", "--out", tmp_path]
    command += ["--contexts", "20", "40", "--batches", "2"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "decode-cpu.jsonl").read_text().splitlines()]
    short, long = ([r for r in records if r["context"] == context] for context in (20, 40))
    grown = {a["model"]: b["bytes"] - a["bytes"] for a, b in zip(short, long, strict=True)}
    # Keys and values of 6 layers of width 256 in float32, 2 rows.
    caches = 2 * 20 * 6 * 2 * 256 * 4
    assert grown == {"Grassmann": 0, "Transformer": caches, "local attention": 0, "GPT-2 (transformers)": caches}
    assert min(r["ms"] for r in records) > 0
    # 16 vectors of 32 numbers a layer, and what counts the tokens.
    (own,) = (r["bytes"] for r in short if r["model"] == "Grassmann")
    assert own < 2 * 6 * (16 * 32 * 4 + 64)


def test_the_host_benchmark_times_every_layer(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/host.py", "--repeats", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "host-cpu.jsonl").read_text().splitlines()]
    assert {r["slot"] for r in records} == {"mixer", "residual", "ffn", "head"}
    for r in records:
        assert list(r["microseconds"]) == ["inference", "forward", "forward + backward"]
        assert min(r["microseconds"].values()) > 0
