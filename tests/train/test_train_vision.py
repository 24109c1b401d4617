import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from grassland.archs import CheckpointError, CosineHead, SharedMoE
from grassland.train.__main__ import main
from grassland.train.classify import Tally
from grassland.train.compare.presets import load_comparisons
from grassland.train.config import VisionConfig
from grassland.train.data.image_sources import load_images
from grassland.train.ema import WeightAverage
from grassland.train.log import read_metrics
from grassland.train.optim import parameter_groups
from grassland.train.recipes import recipe
from grassland.train.start import run
from grassland.train.tasks.vision import ImageClassification
from grassland.train.vision_model import ImageModelSpec, build_vision_model, load_vision_model

FEW = {"batch_size": 2, "steps": 11, "eval_every": 0, "save_every": 0}
PLAIN = {"repeats": 1, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "auto_augment": None, "hflip": 0.0, "crop": "padded"}


def resume(folder, **changes):
    stored = VisionConfig.from_dict(json.loads((folder / "config.json").read_text())["run"])
    return run(ImageClassification, replace(stored, resume=str(folder), **changes))


@pytest.mark.parametrize(
    "changes, later",
    [
        ({"optimizer": "lamb", "loss": "bce", "schedule": "linear"}, ["--workers", "2"]),
        # At 16 pixels the last stage has images of one: there oneDNN leaves the bf16 gradient unwritten for what a
        # convolution with stride 2 sees of the padding alone, and fresh memory may be NaN.
        ({"optimizer": "muon", "dtype": "bf16", "grad_accum": 2, "clip": 1.0, "img_size": 32}, []),
        ({"optimizer": "sgd", "mixup": 0.0, "cutmix": 0.0, "schedule": "step", "log_every": 4}, []),
        ({"optimizer": "adamw", "ema": 0.0, "channels_last": False, "bad_images": "skip"}, []),
        ({"head": "grassmann", "subspace_dim": 2, "optimizer": "lamb", "head_lr": 0.1}, []),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_an_interrupted_run_ends_with_the_very_numbers_of_a_straight_one(vision, changes, later, assert_resumes):
    assert_resumes(ImageClassification, vision(**changes), 5, *later)


def test_a_run_on_digits_learns_and_its_features_transfer(vision, tmp_path, capsys, numbers):
    folder = tmp_path / "run"
    settings = vision(**PLAIN, set=("channels=8,16,32,32", "stem_width=8"), batch_size=32)
    run(ImageClassification, replace(settings, out=str(folder), steps=100, eval_every=50, save_every=0))
    events = read_metrics(folder)
    assert events[0]["classes"] == 10 and events[0]["splits"]["test"] == 161
    (test,) = numbers(folder, ("test",))
    assert test["top1"] > 0.8 and test["top1"] <= test["top5"] <= 1 and test["error"] == pytest.approx(1 - test["top1"])
    best = min(event["error"] for event in numbers(folder, ("valid",)))
    task = ImageClassification(settings, torch.device("cpu"))
    assert task.evaluate(load_vision_model(folder), "valid")["error"] == best
    assert (folder / "curves.png").exists()
    for classifier in ("logistic", "svm"):
        capsys.readouterr()
        command = ["transfer", str(folder), "--data", "digits", "--classifier", classifier, "--c", "0.1", "1"]
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["test_top1"] > 0.85 and result["features"] == 32 and result["c"] in (0.1, 1)
    assert len((folder / "transfer.jsonl").read_text().splitlines()) == 2


def test_accuracies_and_calibration_error_by_hand():
    tally = Tally()
    p = torch.tensor(
        [[0.70, 0.06, 0.06, 0.06, 0.06, 0.06], [0.05, 0.55, 0.1, 0.1, 0.1, 0.1], [0.04, 0.06, 0.56, 0.19, 0.08, 0.07]]
    )
    tally.add(p.log(), torch.tensor([0, 0, 1]))
    tally.add(p.log(), torch.tensor([-100, 1, -100]))
    metrics = tally.metrics()
    # Images: right at .70; wrong at .55, the target the sixth of six; wrong at .56, the target the fifth; right at .55.
    assert metrics["top1"] == pytest.approx(2 / 4) and metrics["top5"] == pytest.approx(3 / 4)
    assert metrics["loss"] == pytest.approx(
        -(math.log(0.7) + math.log(0.05) + math.log(0.06) + math.log(0.55)) / 4, rel=1e-5
    )
    # Bins of width 1/15: .55 and .56 lie in (8/15, 9/15], .70 in (10/15, 11/15].
    expected = 1 / 4 * abs(1 - 0.70) + 3 / 4 * abs(1 / 3 - (0.55 + 0.55 + 0.56) / 3)
    assert metrics["ece"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_logits_that_give_no_probabilities_have_no_accuracy(odd):
    logits = torch.eye(6)
    whole, tally = Tally(), Tally()
    whole.add(logits, torch.arange(6))
    tally.add(logits, torch.arange(6))
    tally.add(torch.full((2, 6), odd), torch.tensor([-100, -100]))
    assert tally.metrics() == whole.metrics() and whole.metrics()["error"] == 0
    tally.add(torch.full((2, 6), odd), torch.tensor([0, -100]))
    assert all(map(math.isnan, tally.metrics().values()))


def test_few_classes_and_no_images():
    tally = Tally()
    tally.add(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    assert tally.metrics()["top5"] == 1 and tally.metrics()["top1"] == 0.5
    with pytest.raises(ValueError, match="no readable image"):
        Tally().metrics()


OWN = {"model": "vit_b16", "ema": 0.0}
OWN["set"] = ("dim=16", "depth=1", "ffn_dim=16", "num_heads=2", "patch_size=8", "dropout=0")


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.0, "cutmix": 0.0}], ids=["mixed", "classes"])
@pytest.mark.parametrize("changes", [{}, OWN], ids=["timm", "own"])
def test_a_grassmann_head_trains_by_its_fused_loss(vision, changes, mixed, monkeypatch):
    settings = {**changes, **mixed, "set": changes.get("set", ("channels=4,8,8,8", "stem_width=4"))}
    task = ImageClassification(vision(head="grassmann", subspace_dim=2, **settings), torch.device("cpu"))
    batch = next(task.batches(3))
    logits = task.model(task._images(batch.images))
    smoothing = 0.0 if batch.targets.ndim == 2 else 0.1
    expected = nn.functional.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
    monkeypatch.setattr("grassland.archs.heads.grassmann.subspace_logits", None)
    loss = task.loss(task.model, batch)
    torch.testing.assert_close(loss, expected)
    parameters = list(task.model.parameters())
    found, wanted = (torch.autograd.grad(each, parameters) for each in (loss, expected))
    scale = max(gradient.abs().max().item() for gradient in wanted)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5 * scale)


def test_binary_cross_entropy_counts_targets_above_the_threshold_as_ones(vision):
    settings = {"loss": "bce", "bce_threshold": 0.2, "mix_prob": 1.0, "mixup": 4.0, "cutmix": 0.0}
    task = ImageClassification(vision(**settings), torch.device("cpu"))
    batch = next(task.batches(0))
    assert ((batch.targets > 0.2) & (batch.targets < 0.9)).any()
    torch.manual_seed(0)
    loss = task.loss(task.model, batch)
    torch.manual_seed(0)
    logits = task.model(task._images(batch.images))
    ones = (batch.targets > 0.2).float()
    expected = -(ones * logits.sigmoid().log() + (1 - ones) * (1 - logits.sigmoid()).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)


EXPERTS = {**OWN, "model": "widenet_b16", "set": (*OWN["set"], "num_experts=2")}


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("mix", [0.0, 0.4], ids=["classes", "mixed"])
def test_the_balance_of_experts_is_part_of_either_loss(vision, loss, mix):
    task = ImageClassification(vision(**EXPERTS, loss=loss, mixup=mix, cutmix=0.0), torch.device("cpu"))
    task.model.train()
    batch = next(task.batches(0))
    ffns = [module for module in task.model.modules() if isinstance(module, SharedMoE)]
    losses = []
    for weight in (0.0, 1.0):
        for ffn in ffns:
            ffn.balance_weight = weight
        torch.manual_seed(0)
        losses.append(task.loss(task.model, batch).item())
    torch.manual_seed(0)
    balance = sum(task.model.features(batch.images)[1]).item()
    assert balance > 0.1 and losses[1] - losses[0] == pytest.approx(balance, rel=1e-3)


def test_the_average_follows_the_weights_and_is_put_back_on_the_manifold():
    class Normed(nn.Linear):
        def reproject_(self):
            self.weight.data /= self.weight.data.norm()

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), Normed(2, 2))
    average = WeightAverage(model, 0.5)
    start = average.model[1].weight.clone()
    with torch.no_grad():
        model[1].weight += 1.0
    model[0].num_batches_tracked += 7
    average.update(model)
    decay = min(0.5, 2 / 11)
    torch.testing.assert_close(average.model[1].weight, start + (1 - decay))
    assert average.model[0].num_batches_tracked == 7
    assert average.judged()[2].weight.norm() == pytest.approx(1.0)
    assert average.model[2].weight.norm() != pytest.approx(1.0)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_a_weight_with_several_names_is_averaged_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    model[1].bias = shared.bias
    average = WeightAverage(model, 0.5)
    start = [parameter.clone() for parameter in average.model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    average.update(model)
    for before, after in zip(start, average.model.parameters(), strict=True):
        torch.testing.assert_close(after, before + (1 - 2 / 11))


def test_the_judged_and_saved_model_is_the_average(vision, tmp_path):
    task = ImageClassification(vision(), torch.device("cpu"))
    with torch.no_grad():
        task.model.fc.bias += 1.0
    task.after_step()
    task.save(tmp_path, vision())
    assert torch.equal(task.best_model(tmp_path).fc.bias, task.average.model.fc.bias)
    assert not torch.equal(task.model.fc.bias, task.average.model.fc.bias)


def test_a_grassmann_head_is_judged_and_saved_on_its_manifold(vision, tmp_path):
    pytest.importorskip("grassland.archs.interop.timm")
    config = vision(head="grassmann", subspace_dim=2, head_lr=0.5, out=str(tmp_path))
    run(ImageClassification, config)
    assert load_vision_model(tmp_path).fc.orthogonality_error() < 1e-6
    average = load_file(tmp_path / "state.safetensors")["task.average.model.fc.weight"].unflatten(0, (10, 2))
    assert (average @ average.mT - torch.eye(2)).abs().max() > 1e-6


def test_skipped_images_are_counted_in_the_log(vision, tmp_path, numbers):
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            image.fromarray(np.full((9, 9, 3), 20 * number, np.uint8)).save(tmp_path / "data" / name / f"{number}.png")
        for number in range(3):
            (tmp_path / "data" / name / f"bad{number}.png").write_bytes(b"PNG?")
    settings = vision(data=str(tmp_path / "data"), bad_images="skip", out=str(tmp_path / "run"), repeats=1, **FEW)
    assert run(ImageClassification, settings) == 0
    data = load_images(settings.data).splits
    bad = {name: sum("bad" in part.name(i) for i in range(len(part))) for name, part in data.items()}
    assert sum(bad.values()) == 6 and bad["train"] > 0
    # An epoch is 22 images: eleven batches of two. A bad image after another one counts twice for the first.
    assert sum(event["skipped"] for event in numbers(tmp_path / "run", ("train",))) >= bad["train"]
    assert numbers(tmp_path / "run", ("test",))[0].get("skipped", 0) == bad["test"]


@pytest.mark.parametrize(
    "pair", [("unshared (ViT)", "ViT (timm)"), ("unshared, class token", "ViT (timm), class token")]
)
def test_timms_transformer_counts_the_flops_of_our_own(pair):
    """Attention included, which torch's counter has no formula for on a CPU."""
    for package in ("timm", "torchvision", "sklearn"):
        pytest.importorskip(package)
    (plan,) = (plan for plan in load_comparisons("cifar10-cpu") if plan.name == "cifar10-cpu-sharing")
    own, timms = (replace(plan.arms[arm], data="digits") for arm in pair)
    counts = [ImageClassification(config, torch.device("cpu")).flops_per_unit for config in (own, timms)]
    assert counts[0] == counts[1]


def test_only_the_dropout_before_the_classifier_is_dropped():
    pytest.importorskip("timm")
    vgg = build_vision_model(
        ImageModelSpec("timm/vgg11", 3, 32, head_dropout=False, options={"drop_rate": 0.5, "mlp_ratio": 0.01})
    )
    assert [module.p for module in vgg.modules() if isinstance(module, nn.Dropout)] == [0.5]
    assert isinstance(vgg.head.drop, nn.Identity) and vgg.pre_logits.drop.p == 0.5
    resnet = build_vision_model(ImageModelSpec("resnet10t", 3, 32, head_dropout=False, options={"drop_rate": 0.5}))
    assert resnet.drop_rate == 0.0


def test_models_of_timm_survive_a_checkpoint_and_mark_their_parameters(vision, tmp_path):
    config = vision(model="test_vit", set=("depth=1",), img_size=32, crop_pct=0.9)
    task = ImageClassification(config, torch.device("cpu"))
    task.save(tmp_path, config)
    images = torch.randn(2, 3, 32, 32)
    loaded = load_vision_model(tmp_path)
    for name, tensor in task.eval_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Not to the bit: libraries' products differ with where in memory their operands lie.
    torch.testing.assert_close(loaded(images), task.eval_model(images))
    groups = parameter_groups(loaded)
    assert any(p is loaded.pos_embed for p in groups["no_decay"])
    assert any(p is loaded.head.weight for p in groups["decay"])
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: corrupt or truncated"):
        load_vision_model(tmp_path)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--model", "timm/resnet81"], "unknown model 'timm/resnet81'; did you mean 'timm/resnet"),
        (["--model", "grassmann_lm_6l"], "model 'grassmann_lm_6l' is of kind 'lm', not for images"),
        (["--model", "test_vit", "--img-size", "50"], "test_vit does not take images of 50×50"),
        (["--set", "chanels=8,8,8,8"], "chanels"),
        (
            ["--model", "test_vit", "--set", "num_heads=0"],
            "test_vit cannot be built with num_heads=0, img_size=224: ",
        ),
        (["--data", "/nowhere/images"], "/nowhere/images: no such file or folder"),
        (["--recipe", "r51"], "unknown recipe 'r51'; did you mean"),
        (["--auto-augment", "rand-x9"], "auto_augment 'rand-x9'"),
        (["--erase", "2"], "error: erase must lie in [0, 1], got 2.0"),
        (["--head", "grassmann", "--subspace-dim", "600"], "subspace_dim must be at most in_features = 128, got 600"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_that_names_them_and_write_nothing(fail, tmp_path, arguments, named):
    pytest.importorskip("timm")
    assert named in fail("vision", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"batch_size": 7}, "batch_size must be even"),
        ({"erase": 2.0}, "erase must lie in"),
        ({"workers": -1}, "workers must not be negative"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"mixup": float("nan")}, "mixup must be finite, got nan"),
        ({"mean": (0.0, float("inf"), 0.0)}, "mean must be finite"),
        ({"ratio": (0.0, 0.0)}, "ratio must be two positive numbers"),
        ({"scale": (1.0, 0.08)}, "scale must be two positive numbers, the smaller one first"),
        ({"scale": (2.0, 3.0)}, r"scale must lie in \(0, 1\], got \(2.0, 3.0\)"),
        ({"scale": (0.5, 1.5)}, r"scale must lie in \(0, 1\], got \(0.5, 1.5\)"),
        ({"mean": (123.675, 116.28, 103.53)}, r"mean must lie in \[0, 1\], got \(123.675,"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"bce_threshold": 1.0}, "bce_threshold must lie in"),
        ({"bad_images": "ignore"}, "bad_images must be one of"),
        ({"head_lr": 0.1}, "head_lr is for a Grassmann head"),
        ({"head": "grassmann", "loss": "bce"}, "cannot train a Grassmann head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_named(vision, changes, named):
    with pytest.raises(ValueError, match=named):
        vision(**changes)


def test_the_command_line_counts_over_the_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr("grassland.train.start.run", lambda task, config: seen.append(config) or 0)
    assert main(["vision"]) == 0
    assert main(["vision", "--recipe", "r50d", "--subspace-dim", "4", "--steps", "7", "--eval-every", "3"]) == 0
    assert main(["vision", "--recipe", "rsb_a2", "--head", "linear", "--lr", "0.1"]) == 0
    default, short, baseline = seen
    assert default.data == "digits" and default.epochs is not None
    assert (short.model, short.head, short.subspace_dim) == ("timm/resnet50d", "grassmann", 4)
    assert (short.epochs, short.steps, short.eval_epochs, short.eval_every) == (None, 7, None, 3)
    assert (baseline.loss, baseline.lr, baseline.epochs, baseline.recipe) == ("bce", 0.1, 300, "rsb_a2")
    assert VisionConfig.from_dict(json.loads(json.dumps(baseline.to_dict()))) == baseline


@pytest.mark.parametrize("name", ["r50d", "rsb_a2", "deit3_s", "swin_t", "widenet"])
def test_recipes_train_on_files_of_imagenet(name, shared, tmp_path):
    """Full-size JPEGs of other shapes and colours, through each recipe's augmentation, with a small network."""
    pytest.importorskip("timm")
    folder = shared / "data" / "imagenet-samples"
    if not folder.is_dir():
        pytest.skip("no imagenet-samples in the shared data")
    small = ["widenet_cifar", "--set", "patch_size=32"] if name == "widenet" else ["timm/resnet10t"]
    command = ["vision", "--recipe", name, "--model", *small, "--data", str(folder), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "2", "--batch-size", "4", "--grad-accum", "1", "--workers", "0"]) == 0
    events = read_metrics(tmp_path / "run")
    start, test, end = events[0], events[-2], events[-1]
    assert (start["classes"], sum(start["splits"].values())) == (50, 50)
    assert start["config"]["img_size"] == recipe(name).img_size >= 160
    assert math.isfinite(test["loss"]) and (end["event"], end["step"]) == ("end", 2)


def test_bad_folders_and_images_are_one_line_that_names_them(fail, tmp_path):
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "hollow").mkdir()
    assert "hollow: no images in class folders in it" in fail("vision", "--data", tmp_path / "hollow")
    (tmp_path / "hollow" / "ant").mkdir()
    assert "hollow/ant: an empty class folder" in fail("vision", "--data", tmp_path / "hollow")
    (tmp_path / "hollow" / "bee").mkdir()
    for number in range(20):
        path = tmp_path / "hollow" / ("bee" if number % 2 else "ant") / f"{number}.png"
        image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:500])
    command = ["vision", "--data", tmp_path / "hollow", "--out", tmp_path / "out", "--batch-size", 4, "--steps", 2]
    assert ".png: unreadable or truncated" in fail(*command)
    (tmp_path / "wrap").mkdir()
    (tmp_path / "hollow").rename(tmp_path / "wrap" / "flowers")
    assert "wrap: all images are of one class, 'flowers'; give" in fail("vision", "--data", tmp_path / "wrap")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet: not a readable parquet file" in fail("vision", "--data", tmp_path / "bad.parquet")


def test_transfer_names_a_folder_without_an_image_model(fail, tmp_path):
    assert "config.json: no such file" in fail("transfer", tmp_path)
    (tmp_path / "config.json").write_text('{"format": "grassland", "version": 1, "model": {}, "task": "lm"}')
    assert "no run of an image model" in fail("transfer", tmp_path)


def test_transfer_names_a_bad_option_and_a_split_without_a_readable_image(fail, vision, tmp_path):
    image = pytest.importorskip("PIL.Image")
    run(ImageClassification, vision(out=str(tmp_path / "run"), steps=1))
    assert fail("transfer", tmp_path / "run", "--workers", "-1").startswith("error: workers must not be negative")
    for c in ("nan", "inf", "0"):
        assert "c must be one positive, finite number or more, got (1.0, " in fail("transfer", tmp_path, "--c", 1, c)
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / "data" / name).mkdir(parents=True)
        image.new("RGB", (9, 9)).save(tmp_path / "data" / name / "0.png")
    (tmp_path / "data/val/a/0.png").write_bytes(b"")
    command = ["transfer", tmp_path / "run", "--data", tmp_path / "data", "--bad-images", "skip"]
    assert "data data: there is no readable image in the valid split" in fail(*command)


def test_a_run_that_met_a_bad_image_can_go_on_without_it(vision, tmp_path, monkeypatch):
    from grassland.train.data.images import Arrays, ImageError

    opened = Arrays.open

    def opening(self, index):
        if index % 50 == 7:
            raise ImageError(f"image {index} is bad")
        return opened(self, index)

    monkeypatch.setattr(Arrays, "open", opening)
    config = vision(out=str(tmp_path / "run"), batch_size=64, steps=2)
    with pytest.raises(ImageError, match="--bad-images skip"):
        run(ImageClassification, config)
    arguments = ["vision", "--resume", str(tmp_path / "run"), "--bad-images", "skip"]
    assert main(arguments) == 0


def test_other_data_are_refused_on_resumption(vision, tmp_path, monkeypatch):
    run(ImageClassification, vision(out=str(tmp_path / "run"), steps=1))
    identity = ImageClassification.identity
    monkeypatch.setattr(ImageClassification, "identity", lambda self: {**identity(self), "data": "other"})
    with pytest.raises(CheckpointError, match="saved for the data"):
        resume(tmp_path / "run", steps=2)


def test_images_are_judged_at_a_size_of_their_own(vision, fail):
    task = ImageClassification(vision(img_size=16, eval_size=24), torch.device("cpu"))
    sides = []
    task.model.register_forward_pre_hook(lambda _, images: sides.append(images[0].shape[-1]))
    task.loss(task.model, next(task.batches(0)))
    task.evaluate(task.model, "valid")
    assert sides[0] == 16 and set(sides[1:]) == {24}
    assert "does not take images of 24×24" in fail("vision", "--model", "widenet_cifar", "--eval-size", "24")


def test_a_cosine_head_is_trained_and_loaded(vision, tmp_path):
    config = vision(head="cosine", optimizer="muon", out=str(tmp_path / "run"))
    assert run(ImageClassification, config) == 0
    model = load_vision_model(tmp_path / "run")
    assert isinstance(model.get_classifier(), CosineHead)
    assert model(torch.randn(2, 3, 16, 16)).abs().max() <= 25
    (test,) = [e for e in read_metrics(tmp_path / "run") if e["event"] == "test"]
    assert 0 <= test["top1"] <= 1


def test_a_validation_may_see_some_batches_and_a_test_sees_all(vision, judged):
    task = ImageClassification(vision(valid_batches=1, batch_size=4), torch.device("cpu"))
    for split in ("valid", "test"):
        task.evaluate(task.model, split)
    sizes = {split: len(part) for split, part in task.data.splits.items()}
    assert sizes["valid"] > 4 and judged == {"valid": 1, "test": -(-sizes["test"] // 4)}
