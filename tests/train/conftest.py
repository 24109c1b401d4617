import random
from dataclasses import replace

import pytest

from grassland.train.config import LMConfig, VisionConfig

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
