"""Files with anything in them: our errors come out, or nothing does; never another one, a crash or a hang."""

import io
import json
import random
import struct
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grassland.archs import CheckpointError, create_model, load_model, save_model
from grassland.archs.io import read_config, read_tensors
from grassland.train.checkpoint import STATE_FILE, load_state, save_state
from grassland.train.data import load_text
from grassland.train.data.image_sources import load_images
from grassland.train.data.images import ImageError, decode
from grassland.train.data.tokenizer import load_tokenizer
from grassland.train.log import read_metrics

# The same examples everywhere and always.
FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damages(draw):
    """A function that damages bytes: cuts, flips, inserts."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "zero"]))
    place, noise = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=16))

    def damage(content):
        at = int(place * len(content))
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + noise + content[at:]
        over = noise if kind == "flip" else bytes(64)
        return (content[:at] + over + content[at + len(over) :])[: len(content)]

    return damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model's folder with a state."""
    folder = tmp_path_factory.mktemp("saved")
    model = create_model("lm", vocab_size=11, dim=8, depth=1, ffn_dim=8, max_len=8, rank=4, offsets=(1,))
    save_model(model, folder)
    save_state(folder, {"model": model.state_dict(), "step": 3, "rows": [1, (2.5, None)]})
    return folder


def attempt(call, *errors):
    try:
        call()
    except errors as error:
        assert str(error)


@FIXED
@given(damage=damages())
def test_weights(saved, tmp_path, damage):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(damage((saved / "model.safetensors").read_bytes()))
    attempt(lambda: load_model(tmp_path), CheckpointError)


def entry(shape, offsets):
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


@FIXED
@given(length=st.integers(0, 2**64 - 1), header=JSON, rest=st.binary(max_size=64), honest=st.booleans())
@example(length=2**63, header={}, rest=b"", honest=False)
@example(length=0, header=entry([2**62, 4], [0, 16]), rest=bytes(16), honest=True)
@example(length=0, header=entry([-1], [8, 4]), rest=bytes(16), honest=True)
def test_a_safetensors_header(tmp_path, length, header, rest, honest):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if honest else length) + text + rest)
    attempt(lambda: read_tensors(path), CheckpointError)
    (tmp_path / STATE_FILE).write_bytes(path.read_bytes())
    attempt(lambda: load_state(tmp_path), CheckpointError)


@FIXED
@given(damage=damages())
def test_a_state(saved, tmp_path, damage):
    (tmp_path / STATE_FILE).write_bytes(damage((saved / STATE_FILE).read_bytes()))
    attempt(lambda: load_state(tmp_path), CheckpointError)


@FIXED
@given(key=st.sampled_from(["format", "version", "model"]), value=JSON, damage=st.none() | damages())
def test_a_config(saved, tmp_path, key, value, damage):
    content = json.loads((saved / "config.json").read_text())
    text = json.dumps({**content, key: value}).encode()
    (tmp_path / "config.json").write_bytes(damage(text) if damage else text)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    attempt(lambda: read_config(tmp_path), CheckpointError)
    attempt(lambda: load_model(tmp_path), CheckpointError)


@FIXED
@given(
    key=st.sampled_from(["dim", "depth", "vocab_size", "mixer", "residual", "norm", "dropout", "offsets", "?"]),
    # Sizes that a machine could not hold are no less a mistake, but building is how they are found.
    value=JSON.filter(lambda value: not isinstance(value, int) or isinstance(value, bool) or value < 50),
)
def test_a_setting_of_a_model(saved, tmp_path, key, value):
    content = json.loads((saved / "config.json").read_text())
    content["model"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    attempt(lambda: load_model(tmp_path), CheckpointError)


@FIXED
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_vocabularies_and_logs(tmp_path, content):
    for name in ("tokenizer.json", "vocab.txt", "metrics.jsonl"):
        (tmp_path / name).write_bytes(content)
    attempt(lambda: load_tokenizer(str(tmp_path / "tokenizer.json")), ValueError)
    attempt(lambda: load_tokenizer(str(tmp_path / "vocab.txt")), ValueError)
    attempt(lambda: read_metrics(tmp_path), ValueError)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [" ".join(random.Random(row).choices(["a", "bee", "see", "dee"], k=9)) for row in range(80)]
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    images = [{"bytes": picture("PNG", row), "path": None} for row in range(80)]
    tables.write_table(arrow.table({"text": texts, "image": images, "label": [row % 4 for row in range(80)]}), path)
    return path.read_bytes()


def picture(form, value=7):
    image = pytest.importorskip("PIL.Image").new("RGB", (24, 16), (value, 90, 200 - value))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@FIXED
@given(damage=damages())
def test_parquet(parquet, tmp_path, damage):
    path = tmp_path / "rows.parquet"
    path.write_bytes(damage(parquet))
    attempt(lambda: load_text(str(path)), ValueError)
    attempt(lambda: load_images(str(path)), ValueError)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures(form):
    whole = picture(form)

    @FIXED
    @given(damage=damages())
    def read(damage):
        attempt(lambda: decode(damage(whole), "it"), ImageError)

    read()
    assert decode(whole, "it").size == (24, 16)


def test_a_picture_that_claims_to_be_huge():
    header = b"P6 100000 100000 255\n"
    with pytest.raises(ImageError, match="unreadable"):
        decode(header + bytes(100), "it")


@FIXED
@given(content=st.binary(max_size=300))
def test_text(tmp_path, content):
    path = Path(tmp_path / "text.txt")
    path.write_bytes(content)
    attempt(lambda: load_text(str(path)), ValueError)
