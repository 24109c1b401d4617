"""Layers recorded as CUDA graphs in somebody else's loop."""

import copy

import pytest
import torch
from torch import nn

from grassland.archs import CausalGrassmannMixer, GrassmannHead, KromHC, SharedMoE

LAYERS = {
    "mixer": (lambda: CausalGrassmannMixer(64, rank=8, offsets=(1, 2, 4)), (2, 16, 64)),
    "streams": (lambda: KromHC(nn.Linear(64, 64), 64, num_streams=4), (2, 16, 4, 64)),
    "experts": (lambda: SharedMoE(64, 96, noise=False), (2, 16, 64)),
    "head": (lambda: GrassmannHead(64, 10, subspace_dim=4), (32, 64)),
}


def gradients(layer, x):
    out = layer(x)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    loss = torch.stack([o.float().square().mean() for o in outputs]).sum()
    return [o.detach().clone() for o in outputs] + list(torch.autograd.grad(loss, [x, *layer.parameters()]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_recorded_layer_has_the_gradients_of_a_plain_one(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().cuda()
    x = torch.randn(shape, device="cuda", requires_grad=True)
    plain = copy.deepcopy(layer)
    recorded = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x, requires_grad=True),))
    # The second time as well: a replay must not see what the one before has left.
    for _ in range(2):
        for found, expected in zip(gradients(recorded, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(found, expected)
