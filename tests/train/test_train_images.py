import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from grassland.train.data import image_sources
from grassland.train.data.image_batches import EvalBatches, TrainBatches, load_batches, train_transform
from grassland.train.data.image_sources import load_images
from grassland.train.data.images import ImageError, decode
from grassland.train.start import seed_everything

Image = pytest.importorskip("PIL.Image")


def encoded(value, size=12, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four classes of six images; the pixel value tells class and number."""
    root = tmp_path / "images"
    for label, name in enumerate(["ant", "bee", "cat", "dog"]):
        (root / name).mkdir(parents=True)
        for number in range(6):
            (root / name / f"{number}.png").write_bytes(encoded(10 * label + number))
    return root


def write_parquet(path, labels, images=None, names=("img", "label")):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = images or [encoded(label % 200) for label in labels]
    rows = [{"bytes": image, "path": None} for image in images]
    parquet.write_table(arrow.table({names[0]: rows, names[1]: arrow.array(labels, arrow.int64())}), path)


def value(part, index):
    return np.asarray(part.open(index))[0, 0, 0]


def test_digits_are_split_the_same_way_each_time():
    pytest.importorskip("sklearn")
    first, second = load_images("digits"), load_images("digits")
    assert first.key == second.key and first.classes == tuple("0123456789")
    sizes = {name: len(part) for name, part in first.splits.items()}
    assert sum(sizes.values()) == 1797 and min(sizes.values()) > 150
    images = {name: [part.open(i).tobytes() for i in range(len(part))] for name, part in first.splits.items()}
    assert not set(images["train"]) & set(images["test"])


def test_a_single_folder_is_split_without_loss_or_overlap(folder):
    data = load_images(str(folder))
    assert data.classes == ("ant", "bee", "cat", "dog")
    found = [(value(part, i), int(part.labels[i])) for part in data.splits.values() for i in range(len(part))]
    assert sorted(found) == [(10 * label + number, label) for label in range(4) for number in range(6)]
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 20, "valid": 2, "test": 2}
    assert data.tested_on == "test"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_train_and_validation_folders(folder, tmp_path, name):
    root = tmp_path / "split"
    root.mkdir()
    folder.rename(root / "train")
    (root / name / "cat").mkdir(parents=True)
    (root / name / "cat" / "x.PNG").write_bytes(encoded(99))
    data = load_images(str(root))
    assert len(data.splits["train"]) == 24 and data.splits["valid"].labels.tolist() == [2]
    assert value(data.splits["test"], 0) == 99 and data.tested_on == "valid"
    (root / name / "emu").mkdir()
    with pytest.raises(ValueError, match="emu: there is no class of this name in train"):
        load_images(str(root))


def test_cifar_parquet(shared):
    pytest.importorskip("pyarrow")
    if not (shared / "data" / "cifar-10").is_dir():
        pytest.skip("no cifar-10 in the shared data")
    data = load_images(str(shared / "data" / "cifar-10" / "test.parquet"))
    assert data.classes[:3] == ("airplane", "automobile", "bird") and data.name == "test.parquet"
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 8100, "valid": 1000, "test": 900}
    image = data.splits["train"].open(0)
    assert image.size == (32, 32) and image.mode == "RGB" and len(set(data.splits["train"].labels)) == 10


def test_parquet_folder_and_its_columns(tmp_path):
    for name, labels in (("train-00000", [0, 1, 2]), ("train-00001", [2, 1]), ("test", [1])):
        write_parquet(tmp_path / f"{name}.parquet", labels)
    data = load_images(str(tmp_path), "img", "label")
    assert sorted([*data.splits["train"].labels, *data.splits["valid"].labels]) == [0, 1, 1, 2, 2]
    assert all(value(part, i) == part.labels[i] for part in data.splits.values() for i in range(len(part)))
    for columns, named in ((("pic", None), "no column 'pic'"), (("label", None), "'label' holds no images")):
        with pytest.raises(ValueError, match=named):
            load_images(str(tmp_path), *columns)


def test_shards_of_other_types_are_one_set(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kinds = [("binary", "int64"), ("large_binary", "int32"), ("binary", "uint8")]
    for shard, (image, label) in enumerate(kinds):
        columns = {"image": arrow.array([encoded(shard)], image), "label": arrow.array([shard], label)}
        parquet.write_table(arrow.table(columns), tmp_path / f"train-{shard}.parquet")
    write_parquet(tmp_path / "valid.parquet", [2])
    data = load_images(str(tmp_path))
    assert data.splits["train"].labels.tolist() == [0, 1, 2]
    assert [value(data.splits["train"], i) for i in range(3)] == [0, 1, 2]
    write_parquet(tmp_path / "train-3.parquet", [0])
    with pytest.raises(ValueError, match=r"train-3.parquet: its images are struct<.*those of train-0.parquet binary"):
        load_images(str(tmp_path))


def test_classes_in_another_order_are_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, order in (("train", ["ant", "bee"]), ("valid", ["bee", "ant"])):
        path = tmp_path / f"{name}.parquet"
        write_parquet(path, [0, 1])
        known = json.dumps({"info": {"features": {"label": {"names": order}}}})
        parquet.write_table(parquet.read_table(path).replace_schema_metadata({"huggingface": known}), path)
    with pytest.raises(ValueError, match=r"valid.parquet: its classes are bee, ant, but others' are ant, bee"):
        load_images(str(tmp_path))


def test_split_folders_are_no_classes(folder, tmp_path):
    root = tmp_path / "split"
    root.mkdir()
    folder.rename(root / "Train")
    (root / "Val" / "cat").mkdir(parents=True)
    (root / "Val" / "cat" / "x.png").write_bytes(encoded(99))
    (root / "Train" / "ant" / ".cache").mkdir()
    (root / "Train" / "ant" / ".cache" / "0.png").write_bytes(encoded(0))
    data = load_images(str(root))
    assert data.classes == ("ant", "bee", "cat", "dog") and len(data.splits["train"]) == 24
    (root / "Train").rename(root / "test")
    with pytest.raises(FileNotFoundError, match="no train folder beside test, val"):
        load_images(str(root))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_images_of_16_bits_keep_the_upper_8(form):
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(buffer, form)
    assert np.asarray(decode(buffer.getvalue(), "it"))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_images_without_a_range_are_errors():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((2, 2), np.float32)).save(buffer, "TIFF")
    with pytest.raises(ImageError, match=r"image it: .*mode F have no known range"):
        decode(buffer.getvalue(), "it")


def test_hub_data_without_labels_in_its_test_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    sets = {}
    for split, labels in (("train", [0, 1, 1]), ("validation", [1, 0]), ("test", [-1, -1])):
        rows = {"image": [{"bytes": encoded(50 + i), "path": None} for i in range(len(labels))], "label": labels}
        rows["other"] = [{"bytes": b"no image", "path": None}] * len(labels)
        kinds = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"]), other=datasets.Image()
        )
        sets[split] = datasets.Dataset.from_dict(rows, features=kinds)
    monkeypatch.setattr(image_sources, "load_hub", lambda source: datasets.DatasetDict(sets))
    data = load_images("someone/images")
    assert data.classes == ("no", "yes") and data.tested_on == "valid"
    assert [value(data.splits["train"], i) for i in range(3)] == [50, 51, 52]
    assert data.splits["test"].labels.tolist() == [1, 0]


@pytest.mark.parametrize("labels, named", [([0, 1, -2], "label -2"), ([0, None, 1], "1 rows have no label")])
def test_bad_labels_are_named(tmp_path, labels, named):
    write_parquet(tmp_path / "a.parquet", labels, [encoded(0)] * 3)
    with pytest.raises(ValueError, match=named):
        load_images(str(tmp_path / "a.parquet"))


def test_a_split_without_rows_is_named(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1])
    nothing = {"img": arrow.array([], "binary"), "label": arrow.array([], "int64")}
    parquet.write_table(arrow.table(nothing), tmp_path / "valid.parquet")
    with pytest.raises(ValueError, match="no images in the valid split"):
        load_images(str(tmp_path))


def test_a_column_that_may_be_of_labels_or_not_is_not_guessed(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"id": list(range(9)), "picture": [encoded(i) for i in range(9)], "category": [0, 1, 2] * 3}
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(columns), path)
    with pytest.raises(ValueError, match="labels may be in id, category; give one as --label-column"):
        load_images(str(path))
    assert len(load_images(str(path), label_column="category").classes) == 3
    parquet.write_table(arrow.table({**columns, "label": [10**12 + i for i in range(9)]}), path)
    with pytest.raises(ValueError, match=r"a label is 10+8; classes are numbers from 0 to 999999"):
        load_images(str(path))


def test_a_label_beyond_the_classes_names_split_and_row(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1, 2])
    write_parquet(tmp_path / "valid.parquet", [0, 3])
    with pytest.raises(
        ValueError, match=r"valid: label 3 of .*valid.parquet row 1 is out of range: there are 3 classes"
    ):
        load_images(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "gone"])
def test_an_unreadable_image_is_an_error_that_names_it(folder, damage):
    path = folder / "ant" / "0.png"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "noise": b"no image", "empty": b"", "gone": content}[damage])
    whole = image_sources.Files(folder, ["ant/0.png"], np.zeros(1, np.int64))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ImageError, match=r"ant/0.png: unreadable or truncated"):
        whole.open(0)


def same(left, right):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(left, right, strict=True)
    )


def drawn():
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


def drawn_after_seeding():
    seed_everything(5)
    return drawn()


def test_batches_are_the_same_for_any_number_of_workers_and_leave_the_generators_alone(vision):
    batches = TrainBatches(load_images("digits").splits["train"], 10, vision())
    before = drawn_after_seeding()
    seed_everything(5)
    alone = list(load_batches(batches, range(300, 306), 0))
    assert drawn() == before
    assert same(alone, load_batches(batches, range(300, 306), 2))
    assert same(alone[2:], load_batches(batches, range(302, 306), 0))
    assert not torch.equal(alone[0].images, alone[1].images)


def test_an_epoch_draws_every_image_once_and_repeats_follow_one_another(vision):
    images = load_images("digits").splits["train"]
    plain = TrainBatches(images, 10, vision(mixup=0.0, cutmix=0.0, repeats=1, batch_size=len(images)))
    assert torch.equal(plain[0].targets.sort().values, torch.tensor(images.labels).sort().values)
    twice = TrainBatches(images, 10, vision(mixup=0.0, cutmix=0.0))[0]
    assert torch.equal(twice.targets[::2], twice.targets[1::2])
    assert all(not torch.equal(a, b) for a, b in zip(twice.images[::2], twice.images[1::2], strict=True))
    other = TrainBatches(images, 10, vision(mixup=0.0, cutmix=0.0, seed=1))[0]
    assert not torch.equal(twice.images, other.images)


def test_mixed_targets_are_shares(vision):
    batch = TrainBatches(load_images("digits").splits["train"], 10, vision(mix_prob=1.0))[0]
    assert batch.targets.shape == (8, 10)
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))
    assert batch.targets.min() == pytest.approx(0.01)


def test_evaluation_sees_every_image_once_in_batches_of_one_shape(folder, vision):
    data = load_images(str(folder))
    batches = list(load_batches(EvalBatches(data.splits["train"], vision()), range(3), 0))
    assert [tuple(batch.images.shape) for batch in batches] == [(8, 3, 16, 16)] * 3
    targets = torch.cat([batch.targets for batch in batches])
    assert targets.tolist() == [*data.splits["train"].labels.tolist(), *[-100] * 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_errors_or_skipped_and_counted(folder, vision, workers):
    data = load_images(str(folder))
    part = data.splits["train"]
    bad = part.name(3)
    Path(bad).write_bytes(b"no image")
    config = vision(repeats=1, mixup=0.0, cutmix=0.0, batch_size=20)
    for batches in (TrainBatches(part, 4, config), EvalBatches(part, config)):
        with pytest.raises(ImageError, match=f"^image {bad}: unreadable.*--bad-images skip"):
            list(load_batches(batches, range(1), workers))
    config = vision(repeats=1, mixup=0.0, cutmix=0.0, batch_size=20, bad_images="skip")
    (train,) = load_batches(TrainBatches(part, 4, config), range(1), workers)
    (test,) = load_batches(EvalBatches(part, config), range(1), workers)
    assert train.skipped == test.skipped == 1
    assert (test.targets == -100).sum() == 1 and (train.targets >= 0).all()


def test_no_readable_image_at_all_is_an_error(folder, vision):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    batches = TrainBatches(load_images(str(folder)).splits["train"], 4, vision(bad_images="skip"))
    with pytest.raises(ImageError, match="not one of 20 images can be read"):
        list(load_batches(batches, range(1), 0))


def test_a_padded_crop_shifts_and_an_unknown_policy_is_named(vision):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    config = vision(crop="padded", auto_augment=None, erase=0.0, hflip=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    crops = [np.asarray(train_transform(config)(image)[0] * 255).round().astype(int) for _ in range(20)]
    source = np.pad(np.asarray(image)[:, :, 0], 2).astype(int)
    windows = [source[top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    assert all(any(np.array_equal(crop, window) for window in windows) for crop in crops)
    with pytest.raises(ValueError, match="auto_augment 'nonsense'"):
        train_transform(vision(auto_augment="nonsense"))
