"""Which backend a GPU gets, by its compute capability."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from grassland.kernels import dispatch
from grassland.kernels.testing import specs
from grassland.train.env import report

GPU = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Says what the GPU, which need not be there, is; with every kernel built."""

    def forget():
        dispatch.too_old.cache_clear()
        dispatch.implicit.cache_clear()

    def be(*version):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: version)
        for name, found in (("extension_error", None), ("has_cuda_kernels", True), ("triton_error", None)):
            monkeypatch.setattr(dispatch, name, lambda found=found: found)
        forget()

    yield be
    forget()


with FakeTensorMode():
    X = torch.empty(1, device=GPU)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in specs()])
def test_old_gpus_run_eager(spec, capability):
    op = dispatch.OPS["kronecker_pre" if spec.name == "kronecker_open" else spec.name]
    capability(7, 5)
    assert dispatch.pick(op, X) == dispatch.fastest(op, GPU, torch.float32) == "eager"
    assert dispatch.pick(op, X, "triton") == "triton"
    capability(8, 0)
    assert dispatch.pick(op, X) == ("cuda" if "cuda" in spec.backends else "triton")


def test_cuda_is_refused_where_there_is_no_code_for_the_chip(capability):
    capability(7, 5)
    with pytest.raises(dispatch.BackendError, match=r"'cuda' is not available: .* is 7\.5, .* made for 8\.0 and later"):
        dispatch.pick(dispatch.OPS["plucker_mix"], X, "cuda")
    capability(12, 0)
    assert dispatch.pick(dispatch.OPS["plucker_mix"], X, "cuda") == "cuda"


def test_env_says_why_an_old_gpu_runs_eager(capability):
    capability(7, 5)
    reason = "cuda: eager (this GPU's compute capability is 7.5, the kernels are made for 8.0 and later)"
    assert report().count(reason) == len(dispatch.OPS)
