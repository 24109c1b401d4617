"""A Grassmann head on models of timm's and torchvision's: the classifier replaced, and trained by the fused loss."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grassland.archs import GrassmannHead
from grassland.archs.heads import grassmann_heads, reproject_
from grassland.archs.interop.timm import classifier_names, put_grassmann_head
from grassland.train.ema import WeightAverage

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CLASSES = 7
BUILDERS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=CLASSES),
    "vit": lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=32),
    "vgg": lambda: timm.create_model("vgg11", num_classes=CLASSES, mlp_ratio=0.01),
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES, dropout=0.0),
}


def grassmann(name):
    torch.manual_seed(0)
    return put_grassmann_head(BUILDERS[name](), subspace_dim=3)


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def targets(soft):
    labels = torch.arange(6) % CLASSES
    return 0.7 * F.one_hot(labels, CLASSES).float() + 0.3 * F.one_hot(labels.flip(0), CLASSES) if soft else labels


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_loss_and_its_gradients_are_those_of_the_logits(name, soft):
    model, twin = grassmann(name), grassmann(name)
    expected = F.cross_entropy(twin(images()), targets(soft), label_smoothing=0.1)
    loss = model(images(), labels=targets(soft), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    wanted = gradients(twin, expected)
    scale = max(g.abs().max().item() for g in wanted.values())
    for key, found in gradients(model, loss).items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-3, atol=1e-5 * scale, msg=key)
    # Nothing of the call is left behind: the model gives logits, and the same ones.
    torch.testing.assert_close(model.eval()(images()), twin.eval()(images()))


def test_no_logits_are_written():
    model = grassmann("resnet")
    with Operators() as seen:
        model(images(), labels=targets(False)).backward()
    assert "grassland::subspace_cross_entropy" in seen.names
    assert not any("subspace_logits" in name or "log_softmax" in name for name in seen.names)


def test_bf16_autocast_and_channels_last():
    model = grassmann("resnet").to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    batch = images().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, labels=targets(False))
        expected = F.cross_entropy(twin(batch), targets(False))
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    name = classifier_names(model)[0] + ".weight"
    found, wanted = gradients(model, loss)[name], gradients(twin, expected)[name]
    # Both round the projections' gradient to bf16, at different places.
    assert (found - wanted).norm() <= 2e-2 * wanted.norm()


def test_compiled_it_is_one_graph_and_the_same_loss():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    put_grassmann_head(model, subspace_dim=3)
    x, labels = torch.randn(5, 12), torch.arange(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(x, labels=labels, label_smoothing=0.1)
    expected = model(x, labels=labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
    torch.testing.assert_close(compiled(x), model(x))
    assert not grassmann_heads(model)[0].features_only


def test_an_averaged_copy_has_a_loss_of_its_own():
    model = grassmann("resnet").eval()
    average = WeightAverage(model, 0.5)
    before = average.model(images(), labels=targets(False))
    torch.testing.assert_close(before, model(images(), labels=targets(False)))
    grassmann_heads(model)[0].reset_parameters()
    assert model(images(), labels=targets(False)) != before
    assert average.model(images(), labels=targets(False)) == before


def test_a_distilled_models_loss_is_that_of_its_logits():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=CLASSES)
    put_grassmann_head(model, subspace_dim=2)
    assert len(grassmann_heads(model)) == 2
    expected = F.cross_entropy(model(images()), targets(False))
    torch.testing.assert_close(model(images(), labels=targets(False)), expected)


def test_auxiliary_classifiers_leave_no_one_loss():
    model = torchvision.models.googlenet(num_classes=CLASSES, init_weights=False)
    put_grassmann_head(model, subspace_dim=2)
    with pytest.raises(ValueError, match="labels: GoogLeNet gives GoogLeNetOutputs in training"):
        model(torch.randn(2, 3, 64, 64), labels=torch.arange(2))
    assert model.eval()(images(2)).shape == (2, CLASSES)


def test_an_error_in_the_body_leaves_the_head_as_it_was():
    model = grassmann("vit")
    with pytest.raises(AssertionError):
        model(torch.randn(2, 3, 20, 20), labels=torch.arange(2))
    assert model(images()).shape == (6, CLASSES)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        model(images(), labels=torch.full((6,), CLASSES))


def test_the_classifier_is_replaced_and_survives_reset_classifier():
    from timm.optim import param_groups_weight_decay

    model = put_grassmann_head(timm.create_model("test_resnet", num_classes=7), subspace_dim=4)
    name = classifier_names(model)[0]
    assert isinstance(model.get_submodule(name), GrassmannHead) and model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert f"{name}.weight" in model.no_weight_decay()
    decayed = [
        id(p)
        for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        if group["weight_decay"]
        for p in group["params"]
    ]
    assert id(model.get_submodule(name).weight) not in decayed

    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert model.forward.args == (model,) and twin.forward.args == (twin,)
    twin.reset_classifier(3)
    assert twin(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert twin(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2])).shape == ()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    fresh = twin.get_submodule(name)
    assert isinstance(fresh, GrassmannHead) and (fresh.num_classes, fresh.subspace_dim) == (3, 4)
    twin.reset_classifier(0)
    assert not grassmann_heads(twin)
    with pytest.raises(ValueError, match="has no head"):
        twin(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="no linear classifier"):
        put_grassmann_head(nn.Sequential(nn.Conv2d(3, 3, 1)))

    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    model.get_submodule(name).reset_parameters()
    ema.update(model)
    averaged = ema.module.get_submodule(name)
    assert averaged.orthogonality_error() > 1e-2
    reproject_(ema)
    assert averaged.orthogonality_error() < 1e-6

    for builder in (
        torchvision.models.squeezenet1_1,
        torchvision.models.resnet18,
        torchvision.models.mobilenet_v3_small,
    ):
        other = builder(num_classes=6)
        if builder is torchvision.models.squeezenet1_1:
            with pytest.raises(ValueError, match="no linear classifier"):
                put_grassmann_head(other)
            continue
        put_grassmann_head(other, num_classes=4, subspace_dim=2).eval()
        assert other(torch.randn(1, 3, 64, 64)).shape == (1, 4)
