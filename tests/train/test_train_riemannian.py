import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grassland.archs import GrassmannHead
from grassland.train.optim import GrassmannSGD, Joined, build_optimizer, parameter_groups

NAMES = ["sgd", "adamw", "lamb", "muon"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.LayerNorm(12), GrassmannHead(12, 5, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 10, generator=generator), torch.randint(5, (16,), generator=generator)


def backward(model, seed):
    x, labels = batch(seed)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return loss


def train(model, optimizer, seeds, scheduler=None):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_one_optimizer_for_head_and_body(name):
    if name == "lamb":
        pytest.importorskip("timm")
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, name, lr=1e-2, head_lr=0.3)
    train(model, optimizer, range(20))
    assert model[3].orthogonality_error() < 1e-6
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    head = [group for group in optimizer.param_groups if group["params"][0] is model[3].weight]
    assert len(head) == 1 and head[0]["lr"] == 0.3 and head[0]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["official", "project", "transport"])
def test_resume_is_bitwise(name, mode, tmp_path):
    if name == "lamb":
        pytest.importorskip("timm")
    models, optimizers, schedulers = [], [], []
    for _ in range(2):
        model = network()
        optimizer = build_optimizer(model, name, lr=1e-2, head_lr=0.3, momentum_mode=mode)
        models.append(model)
        optimizers.append(optimizer)
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20))
    train(models[0], optimizers[0], range(7), schedulers[0])
    state = {"model": models[0].state_dict(), "optimizer": optimizers[0].state_dict(), "lr": schedulers[0].state_dict()}
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    models[1].load_state_dict(loaded["model"])
    optimizers[1].load_state_dict(loaded["optimizer"])
    schedulers[1].load_state_dict(loaded["lr"])
    for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
        train(model, optimizer, range(7, 14), scheduler)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizers[0].param_groups[-1]["lr"] < 0.3


def test_clipping_sees_the_head():
    model = network()
    backward(model, 0)
    alone = model[3].weight.grad.norm()
    assert alone > 0
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert total >= alone and model[3].weight.grad.norm() < alone


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_grad_scaler_unscales_the_head_and_skips_infinities(name):
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, plain = (build_optimizer(m, name, lr=1e-2, head_lr=0.1) for m in (model, other))
    backward(other, 0)
    plain.step()
    x, labels = batch(0)
    scaler.scale(F.cross_entropy(model(x), labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model[3].weight, other[3].weight)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(backward(model, 1)).detach()
    model[3].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_golden_trajectory(shared):
    from safetensors.torch import load_file

    for k in (1, 4, 8):
        golden = load_file(shared / "golden" / f"gcr_k{k}.safetensors")
        classes, _, n, lr, momentum, scale = golden["hyper"].tolist()
        head = GrassmannHead(int(n), int(classes), k, scale, dtype=torch.float64).load_official(
            {"fc.weight": golden["weight.0"]}
        )
        optimizer = GrassmannSGD(head.parameters(), lr=lr, momentum=momentum)
        for step in range(sum(name.startswith("loss.") for name in golden)):
            optimizer.zero_grad()
            head.loss(golden[f"features.{step}"], golden[f"labels.{step}"]).backward()
            optimizer.step()
            torch.testing.assert_close(head.weight.detach(), golden[f"weight.{step + 1}"], rtol=0, atol=1e-10)


def test_closure_and_missing_gradients():
    model = network()
    optimizer = build_optimizer(model, "sgd", lr=0.1)
    calls = []

    def closure():
        calls.append(0)
        optimizer.zero_grad()
        return backward(model, 0)

    assert optimizer.step(closure).item() > 0 and len(calls) == 1
    model[3].weight.grad = None
    before = model[3].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[3].weight, before)


def test_several_heads_and_a_head_alone():
    heads = nn.ModuleList([GrassmannHead(6, 3, 2), GrassmannHead(6, 4, 5), GrassmannHead(6, 2, 1)])
    optimizer = build_optimizer(heads, "adamw", lr=0.2)
    assert isinstance(optimizer, GrassmannSGD)
    x, labels = torch.randn(8, 6), torch.arange(8) % 2
    for _ in range(10):
        optimizer.zero_grad()
        sum(head.loss(x, labels) for head in heads).backward()
        optimizer.step()
    assert all(head.orthogonality_error() < 1e-6 for head in heads)


def test_ddp_sees_one_model():
    model = network()
    names = {id(p) for p in parameter_groups(nn.Module())["manifold"]}
    assert names == set()
    assert parameter_groups(nn.ModuleDict({"module": model}))["manifold"] == [model[3].weight]
    assert isinstance(build_optimizer(model), Joined)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": 1e-4}, ValueError, "weight_decay must be 0 on a manifold parameter"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"momentum_mode": "nesterov"}, ValueError, "momentum_mode"),
    ],
)
def test_bad_settings_name_themselves(options, error, message):
    with pytest.raises(error, match=message):
        GrassmannSGD(network()[3].parameters(), **({"lr": 0.1} | options))


def test_bad_parameters_name_themselves():
    with pytest.raises(ValueError, match="no subspace_dim mark"):
        GrassmannSGD([nn.Parameter(torch.eye(4))], lr=0.1)
    with pytest.raises(ValueError, match="n >= k = 5"):
        GrassmannSGD([nn.Parameter(torch.eye(5)[:, :4])], lr=0.1, subspace_dim=5)
    with pytest.raises(
        ValueError, match=r"orthonormal bases of subspace_dim = 2 rows each, got \(4, 4\) with .* 3.0e\+00"
    ):
        GrassmannSGD([nn.Parameter(2 * torch.eye(4))], lr=0.1, subspace_dim=2)
    with pytest.raises(TypeError, match="bfloat16"):
        GrassmannSGD(GrassmannHead(8, 2, 2).bfloat16().parameters(), lr=0.1)
    optimizer = GrassmannSGD([nn.Parameter(torch.eye(4))], lr=0.1, subspace_dim=2)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.eye(4))], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()
