"""A Grassmann head in two processes: every rank steps to the same weights, those of one process on the joint batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grassland.archs import GrassmannHead
from grassland.archs.interop.timm import put_grassmann_head
from grassland.train.optim import build_optimizer
from grassland.train.spread import Spread

RANKS, STEPS, CLASSES = 2, 6, 5
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def network(dtype):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, CLASSES))
    return put_grassmann_head(body, subspace_dim=3).to(dtype)


def batch(step, dtype):
    """Sorted by class: the first half has classes 0 … 2 alone, the second 2 … 4."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(20, 10, generator=generator).to(dtype), torch.arange(20) // 4


def train(model, parameters_of, shard, dtype):
    """The losses of each step on the rows `shard` of its batch."""
    optimizer = build_optimizer(parameters_of, "sgd", lr=0.05, head_lr=0.3)
    losses = []
    for step in range(STEPS):
        x, labels = (tensor[shard] for tensor in batch(step, dtype))
        optimizer.zero_grad()
        loss = model(x, labels=labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def normalised():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        results = {}
        for dtype in (torch.float32, torch.float64):
            model = network(dtype)
            rows = slice(rank * 20 // RANKS, (rank + 1) * 20 // RANKS)
            losses = train(DistributedDataParallel(model), model, rows, dtype)
            results[dtype] = {"losses": losses, "weights": model.state_dict()}
        spread = Spread([normalised()], "ddp", torch.device("cpu"))
        spread.module(batch(0, torch.float32)[0][rows])
        spread.after_step()
        results["statistics"] = spread.model[1].state_dict()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_ranks_hold_the_same_orthonormal_weights(ranks, dtype):
    first, second = (results[dtype]["weights"] for results in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    head = GrassmannHead(12, CLASSES, 3, dtype=dtype)
    head.load_state_dict({"weight": first["3.weight"]})
    assert head.orthogonality_error() < 1e-6
    assert not torch.allclose(first["3.weight"], network(dtype)[3].weight, atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
def test_losses_and_weights_are_those_of_one_process_on_the_joint_batch(ranks, dtype, tolerance):
    model = network(dtype)
    expected = train(model, model, slice(None), dtype)
    found = torch.stack([results[dtype]["losses"] for results in ranks])
    assert (found[0] - found[1]).abs().min() > 1e-3
    torch.testing.assert_close(found.mean(0), expected, rtol=0, atol=tolerance)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ranks[0][dtype]["weights"][name], weight, rtol=0, atol=tolerance, msg=name)


def test_statistics_of_batch_normalisation_are_the_mean_over_the_ranks(ranks):
    alone = []
    for rows in batch(0, torch.float32)[0].chunk(RANKS):
        model = normalised()
        model(rows)
        alone.append(model[1].state_dict())
    assert not torch.equal(alone[0]["running_mean"], alone[1]["running_mean"])
    for name in ("running_mean", "running_var"):
        mean = torch.stack([statistics[name] for statistics in alone]).mean(0)
        for results in ranks:
            torch.testing.assert_close(results["statistics"][name], mean)
