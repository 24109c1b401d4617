import multiprocessing
import os
import random
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grassland.train.config import LMConfig, VisionConfig
from grassland.train.log import read_metrics

SUBJECTS = ["the cat", "a dog", "every bird", "my neighbour", "an old tree", "the naïve reader"]
VERBS = ["sees", "likes", "follows", "remembers", "draws", "counts"]
OBJECTS = ["the moon", "a river", "three stones", "the garden", "nothing at all", "its own shadow"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRASSLAND_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """What survives a kill doesn't depend on fsync, and on a busy disk it takes most of a test's time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def judged(monkeypatch):
    """By split, how many batches the evaluations of tasks have seen."""
    from grassland.train.tasks.base import Task

    counts, chosen = {}, Task.judged

    def counting(self, batches, split):
        for batch in chosen(self, batches, split):
            counts[split] = counts.get(split, 0) + 1
            yield batch

    monkeypatch.setattr(Task, "judged", counting)
    return counts


@pytest.fixture
def numbers():
    """Reads the events of a run without what depends on the clock and the place."""
    volatile = {"elapsed_s", "versions", "machine", "config"}

    def reading(folder, events=("train", "valid", "test")):
        chosen = [event for event in read_metrics(folder) if event["event"] in events]
        kept = lambda key: key not in volatile and not key.endswith("_per_s")  # noqa: E731
        return [{key: value for key, value in event.items() if kept(key)} for event in chosen]

    return reading


@pytest.fixture
def stop_at(monkeypatch):
    """While entered, a process gets SIGTERM while it makes this step."""
    from grassland.train.loop import Trainer

    advance = Trainer.advance

    @contextmanager
    def stopping(step):
        def advance_and_signal(self):
            advance(self)
            if self.step == step:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "advance", advance_and_signal)
            yield

    return stopping


@pytest.fixture
def assert_resumes(tmp_path, stop_at, numbers):
    """A run that is stopped at `step` goes on to the numbers, weights and states of one that is not; both folders.

    more: options of the resumption. gone: a folder that is not there any more by then.
    """
    from grassland.train.__main__ import main
    from grassland.train.checkpoint import load_state
    from grassland.train.start import run

    def comparing(task, settings, step, *more, gone=None):
        straight, stopped = tmp_path / "straight", tmp_path / "stopped"
        assert run(task, replace(settings, out=str(straight))) == 0
        with stop_at(step):
            assert run(task, replace(settings, out=str(stopped))) == 128 + signal.SIGTERM
        assert load_state(stopped)["step"] == step
        if gone is not None:
            gone.rename(tmp_path / "gone")
        assert main([task.name, "--resume", str(stopped), *more]) == 0
        assert numbers(stopped) == numbers(straight)
        for name in ("model.safetensors", "state.safetensors"):
            left, right = load_file(straight / name), load_file(stopped / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), name
        return straight, stopped

    return comparing


@pytest.fixture
def until():
    """Waits until something has happened; for five minutes at the most, for the machine may be busy."""

    def waiting(happened):
        end = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.02)

    return waiting


@pytest.fixture
def fail(capsys):
    """Runs a command that must fail in one line; that line."""
    from grassland.train.__main__ import main

    def failing(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return failing


@pytest.fixture
def text():
    draw = random.Random(0)
    sentences = [f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}." for _ in range(300)]
    return "".join(f"{sentence}{' ' if index % 5 else chr(10) * 2}" for index, sentence in enumerate(sentences))


@pytest.fixture
def text_file(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def config(text_file):
    """A run of 12 steps that takes a second, with everything random that a run can have."""
    return LMConfig(
        model="lm",
        set=("dim=16", "depth=2", "ffn_dim=32", "rank=4", "offsets=1,2", "dropout=0.1"),
        data=str(text_file),
        tokenizer="bpe:280",
        seq_len=16,
        batch_size=4,
        steps=12,
        warmup=3,
        lr=1e-2,
        log_every=1,
        eval_every=4,
        save_every=4,
        samples=1,
        device="cpu",
    )


@pytest.fixture
def variant(config):
    """`config` with some settings changed."""
    return lambda **changes: replace(config, **changes)


@pytest.fixture
def vision():
    """A run of 8 steps on digits that takes a second, with everything random that a run can have."""
    for package in ("timm", "torchvision", "sklearn"):
        pytest.importorskip(package)
    settings = VisionConfig(
        model="timm/resnet10t",
        set=("channels=4,8,8,8", "stem_width=4", "drop_path_rate=0.2", "drop_rate=0.1"),
        img_size=16,
        crop_pct=1.0,
        batch_size=8,
        steps=8,
        warmup=2,
        lr=1e-2,
        log_every=1,
        eval_every=4,
        save_every=4,
        auto_augment="rand-m5-mstd0.5",
        erase=0.5,
        mixup=0.4,
        cutmix=0.4,
        mix_prob=0.7,
        repeats=2,
        label_smoothing=0.1,
        ema=0.9,
        channels_last=True,
        device="cpu",
    )
    return lambda **changes: replace(settings, **changes)


CHILD = """
import os, sys
os.environ.update(environment)
descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(descriptor, 1), os.dup2(descriptor, 2)
import torch
torch.set_num_threads(1)
exec(before)
from grassland.train.__main__ import main
code = main(arguments)
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Starts `main(arguments)` in a process; a function that waits for it. before: code it runs first.

    The processes are forked from one that has imported everything, so that they start at once. They have one thread,
    and so has this one meanwhile: with more the last digits of a loss are others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["grassland.train.start", "grassland.train.tasks.lm", "grassland.train.tasks.vision"]
    )
    processes = []

    def starting(arguments, environment=(), before=""):
        output = str(tmp_path / f"output-{len(processes)}.txt")
        names = {"arguments": [*map(str, arguments)], "output": output, "before": before}
        names["environment"] = {"GRASSLAND_CACHE": os.environ["GRASSLAND_CACHE"], **dict(environment)}
        processes.append(context.Process(target=exec, args=(CHILD, names)))
        processes[-1].start()
        return processes[-1], Path(output)

    yield starting
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    torch.set_num_threads(threads)


@pytest.fixture
def start_all(start):
    """Starts `main(arguments)` in so many connected processes, as torchrun does; what `start` gives, for each."""

    def starting(count, arguments, before=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        ranks = [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [start(arguments, rank, before) for rank in ranks]

    return starting


@pytest.fixture
def launch(start_all):
    """Runs `main(arguments)` in so many connected processes; what the first one prints."""

    def launching(count, *arguments, before=""):
        started = start_all(count, arguments, before)
        for process, output in started:
            process.join(600)
            assert process.exitcode == 0, output.read_text()
        return started[0][1].read_text()

    return launching


@pytest.fixture
def arguments():
    """The command-line arguments of a run's settings."""

    def options(settings, **changes):
        words = [settings.__class__.__name__.removesuffix("Config").lower()]
        default = type(settings)(steps=1 << 30)  # a length that no test has: the command has another by default
        for field in fields(settings):
            value = changes.get(field.name, getattr(settings, field.name))
            if value != getattr(default, field.name) or field.name in ("model", "data", "set"):
                words += _option(field.name, value)
        return words

    return options


def _option(name, value):
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]


@pytest.fixture
def mlm(text_file):
    """A run of 12 steps that takes a second, with everything random that a run can have."""
    from grassland.train.tasks.mlm import MLMConfig

    settings = MLMConfig(
        model="widenet_albert_4e",
        set=("dim=16", "depth=2", "ffn_dim=24", "embed_dim=8", "num_heads=2", "max_len=32", "dropout=0.1"),
        data=str(text_file),
        tokenizer="bpe:280",
        seq_len=24,
        batch_size=4,
        steps=12,
        warmup=3,
        lr=1e-2,
        log_every=4,
        eval_every=4,
        save_every=4,
        samples=1,
        sentence_order=True,
        device="cpu",
    )
    return lambda **changes: replace(settings, **changes)
