"""Run by test_arch_loss.py in a process of its own, in Triton's interpreter: the rows kernel against float64."""

import sys

import torch
import torch.nn.functional as F

from grassland.archs.heads.cross_entropy import IGNORE, _chunk
from grassland.archs.heads.fused_cross_entropy import row_losses


def check(logits, labels, smoothing, padding):
    """At most twice the error of the same in PyTorch, and half an ulp; rows that do not count are exactly zero."""
    wide = logits.double().requires_grad_()
    truth = F.cross_entropy(wide, labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    slope = torch.autograd.grad(truth.sum(), wide)[0]
    vocab = logits.shape[1]
    losses, grad = _chunk(logits.float().clone(), labels, vocab, smoothing, True)
    whole = F.pad(logits, (0, padding), value=7.0)
    torch.testing.assert_close(
        row_losses(whole, labels, vocab, smoothing, IGNORE, 1.0, False),
        found := row_losses(whole, labels, vocab, smoothing, IGNORE, 1.0, True),
        rtol=1e-6,
        atol=1e-6,
    )
    mine = whole[:, :vocab]
    assert not whole[:, vocab:].any()
    for name, exact, eager, ours in (("loss", truth, losses, found), ("gradient", slope, grad.to(mine.dtype), mine)):
        allowed = 2 * (eager.double() - exact).norm() + torch.finfo(ours.dtype).eps / 2 * exact.norm()
        error = (ours.double() - exact).norm()
        assert error <= allowed, f"{name} {tuple(logits.shape)} {logits.dtype}: {error:.2e} > {allowed:.2e}"
    assert not mine[labels == IGNORE].any() and not found[labels == IGNORE].any()


def cases(device):
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((3, 5), (2, 5000), (3, 40000), (4, 30522)):
        for dtype in (torch.float32, torch.bfloat16):
            for smoothing in (0.0, 0.1):
                logits = (5 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(device)
                labels = torch.randint(vocab, (rows,), generator=generator)
                labels[0] = IGNORE
                yield logits, labels.to(device), smoothing, -vocab % 64


if __name__ == "__main__":
    for case in cases(sys.argv[1]):
        check(*case)
    unknown = torch.tensor([4], device=sys.argv[1])
    assert row_losses(torch.zeros(1, 4, device=sys.argv[1]), unknown, 4, 0.0, IGNORE, 1.0, False).isnan().all()
    broken = torch.full((2, 64), float("nan"), device=sys.argv[1])
    assert not row_losses(
        broken, torch.full_like(broken[:, 0], IGNORE, dtype=torch.int64), 9, 0.0, IGNORE, 1.0, True
    ).any()
    assert not broken.any()
    print("ok")
