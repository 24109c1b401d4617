import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grassland.archs import GrassmannHead, create_model, load_model, save_model
from grassland.archs.heads import grassmann_heads, reproject_
from grassland.archs.heads.subspaces import (
    class_angles,
    feature_variability,
    plot_class_angles,
    plot_feature_variability,
    principal_angles,
)
from grassland.train.optim import GrassmannSGD, build_optimizer

LM = {"vocab_size": 40, "dim": 16, "depth": 1, "ffn_dim": 32, "max_len": 8, "rank": 4, "offsets": (1, 2)}


@pytest.fixture
def head():
    torch.manual_seed(0)
    return GrassmannHead(12, 5, subspace_dim=3)


def test_starts_orthonormal_and_random(head):
    assert head.weight.shape == (15, 12) and head.orthogonality_error() < 1e-6
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert (head.weight - before).abs().max() > 0.1 and head.orthogonality_error() < 1e-6
    assert repr(head) == "GrassmannHead(in_features=12, num_classes=5, subspace_dim=3, scale=25)"


def test_loss_is_the_cross_entropy_of_the_logits(head):
    x, labels = torch.randn(2, 4, 12), torch.tensor([[0, 1, -100, 4], [2, 2, 3, -100]])
    logits = head(x)
    assert logits.shape == (2, 4, 5) and torch.equal(head.logits(x), logits)
    torch.testing.assert_close(head.loss(x, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    soft = torch.rand(2, 4, 5).softmax(-1)
    expected = F.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1), label_smoothing=0.2)
    torch.testing.assert_close(head.loss(x, soft, label_smoothing=0.2), expected)
    classes = torch.randint(logits.shape[-1], logits.shape[:-1]).flatten()
    expected = F.cross_entropy(logits.flatten(0, 1), classes, ignore_index=1)
    torch.testing.assert_close(head.loss(x, classes.view(logits.shape[:-1]), ignore_index=1), expected)


def remade(head, how):
    if how == "deepcopy":
        return copy.deepcopy(head)
    if how == "assign":
        other = GrassmannHead(12, 5, subspace_dim=3, device="meta")
        other.load_state_dict(head.state_dict(), assign=True)
        return other
    if how == "to_empty":
        other = GrassmannHead(12, 5, subspace_dim=3, device="meta").to_empty(device="cpu")
        other.reset_parameters()
        return other
    return head.double()


@pytest.mark.parametrize("how", ["deepcopy", "assign", "to_empty", "double"])
def test_a_remade_head_still_goes_to_the_manifold_optimiser(head, how):
    other = remade(head, how)
    optimizer = build_optimizer(other, "adamw", lr=0.1)
    assert isinstance(optimizer, GrassmannSGD)
    other.loss(torch.randn(4, 12, dtype=other.weight.dtype), torch.arange(4)).backward()
    before = other.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(other.weight, before) and other.orthogonality_error() < 1e-6


def test_reproject_finds_the_nearest_bases(head):
    rough = head.weight.detach() + 0.05 * torch.randn(15, 12)
    with torch.no_grad():
        head.weight.copy_(rough)
    head.reproject_()
    assert head.orthogonality_error() < 1e-6
    distance = (head.weight - rough).norm()
    for _ in range(20):
        other = torch.linalg.qr(head.bases.mT + 0.05 * torch.randn(5, 12, 3))
        candidate = (other[0] * other[1].diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.flatten(0, 1)
        assert (candidate - rough).norm() > distance
    with torch.no_grad():
        head.weight[4] = head.weight[3]
    with pytest.raises(ValueError, match="class 1 does not span 3"):
        head.reproject_()


def test_reproject_a_whole_model():
    model = nn.ModuleList([GrassmannHead(6, 2, 2), nn.Sequential(GrassmannHead(8, 3, 4))])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    reproject_(model)
    assert len(grassmann_heads(model)) == 2
    assert all(head.orthogonality_error() < 1e-6 for head in grassmann_heads(model))


def test_official_checkpoint(head):
    source = GrassmannHead(12, 5, subspace_dim=3)
    head.load_official(
        {"state_dict": {"module.fc.weight": source.weight.detach(), "module.conv.weight": torch.ones(1)}}
    )
    torch.testing.assert_close(head.weight, source.weight)
    kept = head.weight.detach().clone()
    bad = {
        "no 'fc.weight'": {"conv.weight": kept},
        "fc.weight must be": {"fc.weight": kept[:3]},
        "orthonormal": {"fc.weight": torch.randn(15, 12)},
    }
    for message, state in bad.items():
        with pytest.raises(ValueError, match=message):
            head.load_official(state)
    assert torch.equal(head.weight, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5, 13), "subspace_dim must be at most in_features = 12, got 13"),
        ((12, 0, 3), "num_classes"),
        ((12, 5, 0), "subspace_dim"),
        ((12, 5, 3, -1.0), "scale"),
    ],
)
def test_bad_sizes_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        GrassmannHead(*arguments)


def test_language_model_with_token_subspaces(tmp_path):
    torch.manual_seed(0)
    model = create_model("lm", head="grassmann", subspace_dim=2, scale=16.0, **LM)
    ids = torch.randint(40, (4, 8))
    loss = model(ids, labels=ids)
    torch.testing.assert_close(loss, F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()))
    optimizer = build_optimizer(model, "adamw", lr=3e-3, head_lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).backward()
        optimizer.step()
    assert model(ids, labels=ids) < 0.7 * loss
    assert model.head.orthogonality_error() < 1e-6
    save_model(model, tmp_path / "run")
    assert torch.equal(load_model(tmp_path / "run")(ids), model(ids))
    assert model.generate(ids[:1, :3], 4).shape == (1, 7)


def test_principal_angles():
    head = GrassmannHead(6, 3, 2, dtype=torch.float64)
    tiny = 1e-9
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, 0] = head.weight[1, 1] = 1
        head.weight[2, 0], head.weight[2, 2] = math.cos(0.3), math.sin(0.3)
        head.weight[3, 1], head.weight[3, 3] = math.cos(tiny), math.sin(tiny)
        head.weight[4, 4] = head.weight[5, 5] = 1
    torch.testing.assert_close(principal_angles(head, 0, 1), torch.tensor([tiny, 0.3], dtype=torch.float64))
    distances = class_angles(head, "distance")
    torch.testing.assert_close(distances, distances.mT)
    assert abs(distances[0, 2].item() - math.pi / 2 * math.sqrt(2)) < 1e-12
    assert class_angles(head, "largest")[0, 1].item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="'median'"):
        class_angles(head, "median")


def test_feature_variability():
    angle = 0.2
    features = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [3 * math.cos(angle), -3 * math.sin(angle)], [0.0, 2.0]]
    )
    found = feature_variability(features, torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(found[[0, 2]], torch.tensor([angle, 0.0], dtype=torch.float64), atol=1e-7, rtol=0)
    assert found[1].isnan()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        feature_variability(features, torch.tensor([0, 0, 2]), 2)


def test_plots(head, tmp_path):
    pytest.importorskip("matplotlib")
    plot_class_angles(head, names=list("abcde")).savefig(tmp_path / "angles.png")
    variability = feature_variability(torch.randn(20, 12), torch.arange(20) % 4, 5)
    figure = plot_feature_variability(variability)
    figure.savefig(tmp_path / "variability.png")
    assert len(figure.axes[0].patches) == 4
    assert (tmp_path / "angles.png").stat().st_size > 1000
