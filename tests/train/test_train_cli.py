import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from grassland.archs.registry import LISTED, unknown
from grassland.train.__main__ import main, read_run_config
from grassland.train.config import LMConfig, default_lm
from grassland.train.data.sources import load_hub
from grassland.train.env import newer_sources
from grassland.train.loop import Trainer
from grassland.train.plot import labelled
from grassland.train.start import run
from grassland.train.tasks import LanguageModeling

SMALL = ["--set", "dim=16", "depth=1", "ffn_dim=16", "rank=4", "offsets=1,2"]


@pytest.fixture
def lm(text_file):
    """The arguments of a tiny run."""
    small = ["--data", text_file, "--tokenizer", "bpe:280", "--seq-len", "16", "--batch-size", "2", "--steps", "2"]
    return ["lm", "--model", "lm", *SMALL, *small]


@pytest.fixture
def trained(variant, tmp_path):
    folder = tmp_path / "trained"
    assert run(LanguageModeling, variant(out=str(folder), steps=2, samples=0)) == 0
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_lm_trains_and_sample_and_plot_use_the_folder_alone(lm, text_file, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([str(argument) for argument in [*lm, "--out", folder]]) == 0
    text_file.unlink()
    command = ["sample", str(folder), "--prompt", "the cat sees", "--tokens", "12", "--top-k", "20", "--seed", "3"]
    outputs = []
    for seed in ("3", "3", "4"):
        capsys.readouterr()
        assert main([*command[:-1], seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("the cat sees") and len(outputs[0]) > len("the cat sees") + 5
    assert outputs[0] == outputs[1] != outputs[2]
    assert main(["plot", str(folder), str(folder), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(folder), "--out", str(tmp_path / "both")]) == 2
    assert "out must name a picture, such as " in capsys.readouterr().err and not list(tmp_path.glob("both/*"))
    assert main(["plot", "--out", str(tmp_path / "none.png")]) == 2
    assert "folders must be" in capsys.readouterr().err and not (tmp_path / "none.png").exists()


def test_subnormal_numbers_are_zero_in_training_and_only_there(lm, tmp_path, monkeypatch):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush subnormal numbers")
    seen, advance = [], Trainer.advance

    def looking(self):
        seen.append(float(torch.tensor(1e-38) * 0.1))
        advance(self)

    monkeypatch.setattr(Trainer, "advance", looking)
    assert main([str(argument) for argument in (*lm, "--out", tmp_path / "run")]) == 0
    assert seen and not any(seen) and float(torch.tensor(1e-38) * 0.1) > 0


def test_an_extension_older_than_its_sources_is_told(tmp_path):
    (tmp_path / "kernels").mkdir()
    assert newer_sources(tmp_path / "kernels") is None  # not built
    (tmp_path / "kernels" / "_C.abi3.so").touch()
    assert newer_sources(tmp_path / "kernels") is None  # installed without sources
    (tmp_path / "csrc").mkdir()
    for name, seconds in (("moe.cpp", -9), ("plucker.cpp", -5)):
        (tmp_path / "csrc" / name).touch()
        os.utime(tmp_path / "csrc" / name, (time.time() + seconds,) * 2)
    assert newer_sources(tmp_path / "kernels") is None
    os.utime(tmp_path / "csrc" / "moe.cpp", (time.time() + 9,) * 2)
    assert newer_sources(tmp_path / "kernels") == "csrc/moe.cpp"


def test_env_reports_versions_and_backends(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "plucker_mix" in out and "cpu:" in out
    assert main(["env", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m grassland.train env")


def test_settings_come_from_the_command_line():
    arguments = ["--lr", "0.5", "--betas", "0.8", "0.95", "--set", "dim=8", "offsets=1,2", "share=mixer,", "--compile"]
    config = read_run_config(LMConfig, default_lm(), arguments, "lm")
    assert (config.lr, config.betas, config.compile) == (0.5, (0.8, 0.95), True)
    assert config.overrides() == {"dim": 8, "offsets": (1, 2), "share": ("mixer",)}
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("option", ["--eval-every", "--eval_every"])
def test_a_length_in_steps_counts_over_one_in_epochs(trained, option):
    from grassland.train.checkpoint import save_run_config

    arguments = [option, "50", "--steps", "9"]
    fresh = read_run_config(LMConfig, LMConfig(epochs=3, eval_epochs=1.0), arguments, "lm")
    stored = LMConfig.from_dict(json.loads((trained / "config.json").read_text())["run"])
    save_run_config(trained, replace(stored, steps=None, epochs=3, eval_epochs=1.0))
    resumed = read_run_config(LMConfig, default_lm(), ["--resume", str(trained), *arguments], "lm")
    for config in (fresh, resumed):
        assert (config.eval_epochs, config.eval_every, config.epochs, config.steps) == (None, 50, None, 9)
    again = read_run_config(LMConfig, default_lm(), ["--resume", str(trained)], "lm")
    assert (again.eval_epochs, again.epochs) == (1.0, 3)


def test_a_model_that_is_named_is_the_preset_and_not_the_small_default(fail, monkeypatch):
    seen = []
    monkeypatch.setattr("grassland.train.start.run", lambda task, config: seen.append(config) or 0)
    assert main(["lm"]) == main(["lm", "--model", "transformer_lm_6l", "--lr", "0.1"]) == 0
    assert seen[0].overrides()["dim"] == 128 and seen[0].optimizer == "muon"
    assert (seen[1].set, seen[1].optimizer, seen[1].lr) == ((), "adamw", 0.1)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--data", "/nowhere/text.txt"], "/nowhere/text.txt: no such file"),
        (["--data", "nowhere/"], "data nowhere/: no such file or folder\n"),
        (["--data", "no where"], "data no where: no such file or folder\n"),
        (["--tokenizer", "/nowhere/vocab.txt"], "/nowhere/vocab.txt: no such file"),
        (["--tokenizer", "bpe:12"], "bpe:12"),
        (["--model", "grassman_lm_6l"], "'grassman_lm_6l'; did you mean 'grassmann_lm_6l'"),
        (["--model", "vit_b16"], "model 'vit_b16' is of kind 'vision', not a causal language model"),
        (["--model", "mlm"], "model 'mlm' is of kind 'mlm', not a causal language model"),
        (["--model", "zzz"], "unknown model 'zzz'; 22 are known, such as "),
        (["--set", "mixer=atention"], "'atention'"),
        (["--set", "dimm=8"], "'dimm'"),
        (["--set", "dim"], "NAME=VALUE, got 'dim'"),
        (["--seq-len", "100000"], "too short: "),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "device 'meta' cannot be used: "),
        (["--set", "options=3"], "options must be a mapping"),
        (["--set", "dtype=float16"], "set dtype=float16: it is no option of a model, give --dtype"),
        (["--set", "vocab_size=5"], "vocab_size must be at least the data's 280, got 5"),
        (["--set", "max_len=4"], "seq_len must be at most the model's max_len=4, got 16"),
        (["--set", "backend=abacus"], "'abacus'"),
        (["--epochs", "inf"], "epochs must be finite, got inf"),
        (["--seed", str(1 << 64)], "seed must be less than 2^64, got 18446744073709551616"),
        (["--warmup-epochs", "nan"], "warmup_epochs must be finite, got nan"),
        (["--betas", "0.9", "1"], "betas must lie in [0, 1), got (0.9, 1.0)"),
        (["--resume", "/nowhere/run"], "/nowhere/run/config.json: no such file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_that_names_them_and_write_nothing(lm, fail, tmp_path, arguments, named):
    assert named in fail(*lm, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "text is empty"),
        (b"  \n\n ", "text is empty"),
        (b"one", "valid text is empty: the last twentieth of so short a text"),
        (b"caf\xe9 au lait", "not UTF-8"),
    ],
    ids=["empty", "blank", "one-word", "latin-1"],
)
def test_unusable_text_is_one_line_that_names_the_file(lm, fail, text_file, content, named):
    text_file.write_bytes(content)
    error = fail(*lm)
    assert named in error and str(text_file) in error


def test_a_batch_larger_than_the_data_is_said(lm, text_file, tmp_path, capsys):
    text_file.write_text("the cat sees the moon. " * 40)
    assert main([str(argument) for argument in [*lm, "--out", tmp_path / "run", "--batch-size", "999"]]) == 0
    assert "batch_size 999 is more than the " in capsys.readouterr().out


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_a_processor_for_which_bf16_is_slow_is_named(variant, tmp_path, capsys, monkeypatch, halves, dtype):
    monkeypatch.setattr("grassland.train.loop.multiplies_halves", lambda: halves)
    assert run(LanguageModeling, variant(dtype=dtype, steps=1, samples=0, out=str(tmp_path / "run"))) == 0
    assert ("float32 is faster here" in capsys.readouterr().out) is (dtype == "bf16" and not halves)


def test_the_hub_is_asked_with_a_word(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    said = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: said.append(capsys.readouterr().err) or {})
    load_hub("nodir")
    assert said == ["data nodir: no such file or folder; asking the hub for it\n"]


def test_unusable_files_are_one_line_that_names_them(lm, fail, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet: not a readable parquet file" in fail(*lm, "--data", tmp_path / "bad.parquet")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer.json" in fail(*lm, "--tokenizer", tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("a\nb")
    assert "vocab.txt: not a WordPiece vocabulary" in fail(*lm, "--tokenizer", tmp_path / "vocab.txt")
    (tmp_path / "hollow").mkdir()
    assert "hollow: no train file" in fail(*lm, "--data", tmp_path / "hollow")


def test_an_unknown_backend_is_one_line_that_names_it(lm, fail, tmp_path, monkeypatch):
    monkeypatch.setenv("GRASSLAND_BACKEND", "abacus")
    monkeypatch.chdir(tmp_path)
    assert "'abacus'" in fail(*lm)
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_something_in_it_is_left_alone(lm, fail, trained):
    before = files(trained)
    assert f"{trained} is not an empty folder; continue its run with --resume" in fail(*lm, "--out", trained)
    assert files(trained) == before
    (trained.parent / "file").touch()
    assert "file is a file, and a run needs a folder" in fail(*lm, "--out", trained.parent / "file")


def test_missing_packages_are_named_with_the_extra(lm, fail, monkeypatch):
    for missing in ("tyro", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            assert f"{missing} is not installed: pip install 'grassland[train]'" in fail(*lm)


def test_a_missing_matplotlib_costs_only_the_curves(variant, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(LanguageModeling, variant(out=str(tmp_path / "run"), steps=1, samples=0)) == 0
    assert "no curves: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_model_is_one_line_that_names_the_file(fail, trained, name, damage):
    path = trained / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage == "gone":
        path.unlink()
    assert name in fail("sample", trained)


def test_a_vocabulary_that_is_not_the_models_is_one_line(fail, trained, text):
    from grassland.train.data import save_tokenizer
    from grassland.train.data.tokenizer import train_bpe

    save_tokenizer(train_bpe(text, 270), trained)
    assert "tokenizer.json has 270 tokens, but the model has vocab_size=280" in fail("sample", trained)
    assert "saved for the data" in fail("lm", "--resume", trained, "--steps", "3")


def test_other_bad_commands_are_one_line(fail, trained):
    assert "unknown command 'lmm'; known: lm, " in fail("lmm")
    assert "/nowhere: no such folder" in fail("sample", "/nowhere")
    assert "prompt '' has no tokens" in fail("sample", trained, "--prompt", "")
    assert "/nowhere/metrics.jsonl: no such file" in fail("plot", "/nowhere")
    assert "temperature" in fail("sample", trained, "--temperature", "-1")


def test_of_very_many_names_the_nearest_are_told():
    error = str(unknown("task", "zz", [f"{name}{number}" for name in ("zqq", "aab") for number in range(9000)]))
    assert "18000 are known, such as zqq" in error and error.count(", zqq") == LISTED - 1


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"lr": -1.0}, {"steps": None}, {"floor": 2.0}, {"dtype": "int8"}, {"lr": float("nan")}]
)
def test_settings_out_of_range_are_named(config, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(config, **changes)


def test_a_process_leaves_with_the_exit_code_and_no_traceback():
    command = [sys.executable, "-m", "grassland.train", "lm", "--data", "/nowhere/a.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: data /nowhere/a.txt: no such file or folder\n"


def test_a_run_of_another_task_is_named(trained, fail):
    assert f"{trained}/config.json: a run of train lm, not of train vision" in fail("vision", "--resume", trained)
    assert "a run of train lm, not of train mlm" in fail("mlm", "--resume", trained)


def test_an_image_model_of_timms_writes_no_text(fail, vision, tmp_path):
    from grassland.train.tasks.vision import ImageClassification

    run(ImageClassification, vision(out=str(tmp_path / "run"), steps=1))
    for command in ("sample", "inspect"):
        assert f"{tmp_path}/run: an image model of timm's, not a language model" in fail(command, tmp_path / "run")


def test_plot_tells_runs_of_one_name_apart_and_names_a_log_that_is_none(fail, trained, tmp_path, monkeypatch):
    other = tmp_path / "other" / "trained"
    shutil.copytree(trained, other)
    assert list(labelled([trained, other, trained])) == [f"{tmp_path.name}/trained", "other/trained"]
    drawn = []
    monkeypatch.setattr("grassland.train.plot._throughput", lambda axes, events, name: drawn.append(name))
    assert main(["plot", str(trained), str(other), "--out", str(tmp_path / "both.png")]) == 0
    assert drawn == [f"{tmp_path.name}/trained", "other/trained"]
    for line, problem in ((b"[1]", "is no event"), (b'{"step": 1}', "is no event"), (b"\xff", "is not JSON")):
        (other / "metrics.jsonl").write_bytes(line + b"\n")
        assert f"{other}/metrics.jsonl: line 1 {problem}" in fail("plot", other, "--out", tmp_path / "a.png")


def test_a_disk_that_is_full_from_the_start_is_named(lm, fail, cache, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("grassland.train.log.MetricsLog.write", full)
        assert f"error: {tmp_path}/run: No space left on device\n" == fail(*lm, "--out", tmp_path / "run")
    monkeypatch.setattr("numpy.save", full)
    shutil.rmtree(cache)
    assert f"cache {cache}/tokens: cannot be written, the disk may be full" in fail(*lm, "--out", tmp_path / "again")


def test_options_that_are_repeated():
    arguments = ["--set", "dim=8", "depth=3", "--lr", "1", "--set=rank=4", "--lr", "0.5", "--set", "depth=2"]
    config = read_run_config(LMConfig, default_lm(), arguments, "lm")
    assert config.overrides() == {"dim": 8, "depth": 2, "rank": 4} and config.lr == 0.5


def test_of_two_runs_to_be_resumed_the_last_one_goes_on_with_its_own_settings(trained, variant, tmp_path):
    other = tmp_path / "other"
    assert run(LanguageModeling, variant(out=str(other), steps=2, samples=0, lr=3e-4)) == 0
    config = read_run_config(LMConfig, default_lm(), ["--resume", str(trained), "--resume", str(other)], "lm")
    assert (config.resume, config.lr) == (str(other), 3e-4)
