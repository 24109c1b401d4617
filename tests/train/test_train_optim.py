import copy

import pytest
import torch
from torch import nn

from grassland.archs import create_model
from grassland.train.optim import build_optimizer, parameter_groups

SIZES = {"vocab_size": 40, "dim": 16, "depth": 2, "ffn_dim": 32, "max_len": 8, "rank": 4, "offsets": (1, 2)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("lm", **SIZES)


def names(model, parameters):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def step(model, optimizer, seed):
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_groups_hold_every_parameter_once_and_decay_matrices_only(model):
    groups = parameter_groups(model)
    everything = [name for members in groups.values() for name in names(model, members)]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    undecayed = names(model, groups["no_decay"])
    assert {"embed.weight", "positions.weight", "norm.weight", "norm.bias"} <= undecayed
    for name, parameter in model.named_parameters():
        assert (name in undecayed) == (parameter.ndim < 2 or name in ("embed.weight", "positions.weight")), name


def test_a_mark_on_a_parameter_decides_its_group(model):
    model.norm.weight.optim_group = "decay"
    assert "norm.weight" in names(model, parameter_groups(model)["decay"])
    model.norm.weight.optim_group = "nowhere"
    with pytest.raises(ValueError, match="'nowhere'"):
        parameter_groups(model)


def test_adamw_decays_exactly_the_decayed_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_muon_steps_hidden_matrices_along_a_nearly_orthogonal_matrix():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 24), nn.Linear(24, 48))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "muon", lr=0.01, weight_decay=0.0)
    model(torch.arange(7)).square().sum().backward()
    # A gradient of rank 7 says nothing about the other directions: replace it by one of full rank.
    gradient = torch.randn(48, 24)
    model[1].weight.grad = gradient.clone()
    optimizer.step()
    update = (before["1.weight"] - model[1].weight.detach()) / (0.01 * 0.2 * 48**0.5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.6 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0) > 0.97
    # Embeddings and biases get AdamW's first step: lr in each coordinate that has a gradient.
    for name in ("1.bias", "0.weight"):
        change = (before[name] - model.state_dict()[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=0)


def test_lambs_first_step_has_the_length_of_the_weight_times_the_rate():
    pytest.importorskip("timm")
    torch.manual_seed(2)
    model = nn.Linear(6, 5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, "lamb", lr=0.1, weight_decay=0.5)
    model(torch.randn(7, 6)).square().sum().backward()
    gradient = model.weight.grad.clone()
    optimizer.step()
    # m / (sqrt(v) + eps) is the sign of the gradient after one step; the decay is added before the trust ratio.
    update = gradient.sign() + 0.5 * weight
    torch.testing.assert_close(
        model.weight, weight - 0.1 * update * weight.norm() / update.norm(), rtol=1e-3, atol=1e-4
    )
    assert ((model.bias - bias).abs() - 0.1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "sgd"])
def test_state_dict_continues_bitwise(model, name):
    optimizer = build_optimizer(model, name, lr=1e-2)
    for seed in range(3):
        step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, name, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_a_scheduler_moves_every_part_of_a_joined_optimizer(model):
    optimizer = build_optimizer(model, "muon", lr=1.0)
    assert len(optimizer.optimizers) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for part in optimizer.optimizers for group in part.param_groups] == [0.5, 0.5]
    with pytest.raises(ValueError, match="the state has 0 optimisers, this optimiser has 2"):
        optimizer.load_state_dict({"optimizers": []})


def test_unknown_optimizer_is_named(model):
    with pytest.raises(ValueError, match="'lion'"):
        build_optimizer(model, "lion")
