"""What holds for subspaces beyond the rungs that every op climbs (test_ops.py, test_triton.py)."""

import math

import pytest
import torch
import torch.nn.functional as F

from grassland.kernels import dispatch
from grassland.kernels.products import multiplies_halves
from grassland.kernels.subspace import (
    MODES,
    grassmann_step,
    grassmann_step_,
    op,
    subspace_cross_entropy,
    subspace_logits,
)
from grassland.kernels.subspace.cases import labelled, motion, orthonormal
from grassland.kernels.testing import Case, check_backend, normal, specs

SIZES = [(5, 1, 9), (19, 2, 13), (7, 4, 40), (3, 8, 33), (2, 16, 50), (2, 32, 65)]
needs_extension = pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
BACKENDS = ["eager", pytest.param("cpp", marks=needs_extension)]


def blocks(weight, k):
    return weight.view(-1, k, weight.shape[1])


def rotations(classes, k, seed=7):
    return torch.linalg.qr(normal(classes, k, k, seed=seed))[0]


def turned(weight, rotation):
    """S Q, as rows."""
    return (rotation.mT @ blocks(weight, rotation.shape[-1])).flatten(0, 1)


def drift(weight, k):
    gram = blocks(weight.double(), k) @ blocks(weight.double(), k).mT
    return (gram - torch.eye(k, dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize(("classes", "k", "n"), SIZES)
def test_logits_see_the_subspace_and_not_its_basis(classes, k, n):
    weight, x = orthonormal(classes, k, n), normal(11, n, seed=1)
    logits = subspace_logits(x, weight, k, 25.0)
    torch.testing.assert_close(subspace_logits(x, turned(weight, rotations(classes, k)), k, 25.0), logits)
    assert logits.min() >= 0 and logits.max() <= 25 + 1e-12
    inside = subspace_logits(weight[:k].sum(0, keepdim=True), weight, k, 25.0)
    torch.testing.assert_close(inside[0, 0], torch.tensor(25.0, dtype=torch.float64))


def test_lines_are_the_scaled_cosine():
    weight, x = orthonormal(6, 1, 9), normal(4, 9, seed=1)
    cosine = F.cosine_similarity(x[:, None], weight[None], dim=-1)
    torch.testing.assert_close(subspace_logits(x, weight, 1, 25.0), 25 * cosine.abs())


def test_logits_at_random_subspaces_average_to_the_papers_value():
    k, n = 8, 384
    logits = subspace_logits(normal(64, n, seed=1), orthonormal(100, k, n), k, 25.0)
    assert abs(logits.mean().item() / (25 * math.sqrt(k / n)) - 1) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True])
def test_loss_is_torchs_cross_entropy_over_many_chunks(backend, soft, monkeypatch):
    monkeypatch.setattr("grassland.kernels.subspace.chunked.CHUNK_ELEMENTS", 64)
    monkeypatch.setattr("grassland.kernels.subspace.chunked.CHUNK_ROWS", 3)
    dtype = torch.float64 if backend == "eager" else torch.float32
    tensors = [t.to(dtype).requires_grad_() for t in (normal(17, 12, seed=1), orthonormal(9, 3, 12))]
    target = normal(17, 9, seed=2).softmax(-1).to(dtype) if soft else torch.arange(17) % 9
    found = subspace_cross_entropy(*tensors, target, 3, 25.0, 0.1, backend=backend)
    logits = subspace_logits(*tensors, 3, 25.0, backend="reference")
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    pairs = zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_extension
def test_the_extension_adds_up_many_classes_in_float64():
    """On every processor: where vectors are short, a sum in float32 was a long chain."""
    x, weight, labels = (t.detach() for t in labelled((2,), 1_000_000, 1, 2).values())
    settings = {"k": 1, "label_smoothing": 0.1, "reduction": "sum"}
    exact = subspace_cross_entropy(x.float().double(), weight.float().double(), labels, **settings)
    found = subspace_cross_entropy(x.float(), weight.float(), labels, **settings, backend="cpp")
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2e-7)


@needs_extension
def test_the_extension_works_through_many_chunks():
    """At least 128 rows are a chunk, however many classes: 300 rows are three."""
    case = Case("many", lambda: labelled((300,), 131072, 1, 2), {"k": 1, "scale": 25.0})
    check_backend(next(spec for spec in specs() if spec.name == "subspace_cross_entropy"), case, "cpp", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retained_graph_gives_its_gradients_again(backend):
    """The last backward scales what the forward has saved in place; those before it must not."""
    leaves = [t.float().requires_grad_() for t in (normal(6, 12, seed=1), orthonormal(5, 3, 12))]
    loss = subspace_cross_entropy(*leaves, torch.arange(6) % 5, 3, backend=backend)
    (3 * loss).backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, expected in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, expected * 5 / 3)


def confident(dtype, rows=48):
    """Features in the subspace of their class: probabilities so near to one that their gradients are tiny."""
    weight = orthonormal(6, 4, 40).to(dtype)
    labels = torch.arange(rows) % 6
    mixed = torch.einsum("rk,rkn->rn", normal(rows, 4, seed=3), blocks(weight.double(), 4)[labels])
    x = (mixed + 0.02 * normal(rows, 40, seed=4)).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), labels


def test_float16_gradients_survive_until_they_are_scaled():
    """The loss scale comes after the op: what float16 cannot hold before must not be lost."""
    x, weight, labels = confident(torch.float16)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    (65536 * subspace_cross_entropy(exact_x, exact_w, labels, 4, backend="reference")).backward()
    (65536 * subspace_cross_entropy(x, weight, labels, 4)).backward()
    for found, wanted in ((x.grad, exact_x.grad), (weight.grad, exact_w.grad)):
        assert torch.linalg.vector_norm(found.double() - wanted) < 0.05 * torch.linalg.vector_norm(wanted)


def test_float16_sums_over_many_rows_stay_finite():
    x, weight, _ = confident(torch.float16)
    labels = torch.zeros(20000, dtype=torch.int64)
    subspace_cross_entropy(x[:1].detach().expand(20000, -1) * 3, weight, labels + 1, 4).backward()
    assert weight.grad.isfinite().all()


def test_the_reference_sums_halves_in_float32():
    x, weight, _ = confident(torch.float16)
    rows, labels = x[:1].detach().expand(20000, -1), torch.ones(20000, dtype=torch.int64)
    exact = subspace_cross_entropy(rows.double(), weight.double(), labels, 4)
    found = subspace_cross_entropy(rows, weight, labels, 4, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_mean_of_no_rows_is_nan_and_trains_nothing_as_in_pytorch(backend):
    x, weight, labels = confident(torch.float32)
    soft = torch.zeros(0, len(weight) // 4)
    for rows, target in ((x, torch.full_like(labels, -100)), (x[:0], labels[:0]), (x[:0], soft)):
        loss = subspace_cross_entropy(rows, weight, target, 4, backend=backend)
        assert loss.isnan() and not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_counts_where_its_row_does(backend):
    x, weight, labels = (t.detach() for t in confident(torch.float32))
    labels[2] = -100
    expected = subspace_cross_entropy(x, weight, labels, 4, backend=backend)
    x[2] = torch.nan
    assert subspace_cross_entropy(x, weight, labels, 4, backend=backend) == expected
    assert subspace_cross_entropy(x, weight, labels.clamp_min(0), 4, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_step_inside_autocast_keeps_the_basis(backend):
    tensors = [t.float() for t in motion(3, 4, 24).values()]
    expected = grassmann_step(*tensors, 4, 0.1, backend=backend)
    in_place = [t.clone() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = grassmann_step(*tensors, 4, 0.1, backend=backend)
        grassmann_step_(*in_place, 4, 0.1, backend=backend)
    for a, b, c in zip(found, in_place, expected, strict=False):
        assert torch.equal(a, c) and torch.equal(b, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_of_the_loss_is_refused(backend):
    x, weight, labels = confident(torch.float32)
    loss = subspace_cross_entropy(x, weight, labels, 4, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="subspace_cross_entropy cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("classes", "k", "n"), SIZES)
def test_gauge_equivariance(classes, k, n, mode):
    tensors = [motion(classes, k, n)[name] for name in ("weight", "buffer", "grad")]
    q = rotations(classes, k)
    plain = grassmann_step(*tensors, k, 1.0, 0.9, mode)
    other = grassmann_step(*[turned(t, q) for t in tensors], k, 1.0, 0.9, mode)
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(turned(a, q), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["project", "transport"])
def test_carried_momentum_is_horizontal(mode):
    weight, buffer, grad = motion(5, 4, 24).values()
    moved, stored = grassmann_step(weight, buffer, grad, 4, 1.0, 0.9, mode)
    at = moved if mode == "transport" else weight
    assert (blocks(at, 4) @ blocks(stored, 4).mT).abs().max() < 1e-13


@pytest.mark.parametrize(("classes", "k", "n"), SIZES)
def test_geodesic_agrees_with_pymanopt_and_geoopt(classes, k, n):
    pymanopt = pytest.importorskip("pymanopt")
    geoopt = pytest.importorskip("geoopt")
    weight, _, grad = motion(classes, k, n).values()
    moved, _ = grassmann_step(weight, torch.zeros_like(weight), grad, k, 0.5, 0.9)
    s, g = blocks(weight, k).mT, blocks(grad, k).mT
    direction = -0.5 * (g - s @ (s.mT @ g))
    manifold = pymanopt.manifolds.Grassmann(n, k)
    for index in range(classes):
        oracle = torch.from_numpy(manifold.exp(s[index].numpy(), direction[index].numpy()))
        found = blocks(moved, k)[index].mT
        # pymanopt may return another basis: compare projectors
        assert (oracle @ oracle.mT - found @ found.mT).abs().max() < 1e-12
        distance = manifold.dist(s[index].numpy(), found.numpy())
        assert abs(distance - direction[index].norm().item()) < 1e-7
    # Along a horizontal direction the geodesic of the Stiefel manifold is the Grassmannian's, basis and all.
    oracle = geoopt.EuclideanStiefel().expmap(s, direction)
    assert (oracle - blocks(moved, k).mT).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("angle", [0.01, 1.0, 2.0, 10.0, 100.0])
def test_large_angles_are_exact_and_orthonormal(angle, backend):
    tensors = motion(3, 4, 24, angle)
    truth = grassmann_step(*tensors.values(), 4, 1.0, backend="reference")[0]
    found = grassmann_step(*[t.float() for t in tensors.values()], 4, 1.0, backend=backend)[0]
    assert drift(found, 4) < 1e-6
    # rounding the inputs alone turns the end by angle * 6e-8 or so
    assert (found.double() - truth).abs().max() < 2e-6 * max(1.0, angle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_without_lr_or_gradient(backend, mode):
    weight, buffer, grad = (t.float() for t in motion(5, 4, 24).values())
    zero = torch.zeros_like(weight)
    assert torch.equal(grassmann_step(weight, buffer, grad, 4, 0.0, 0.9, mode, backend=backend)[0], weight)
    moved, stored = grassmann_step(weight, zero, zero, 4, 0.1, 0.9, mode, backend=backend)
    assert torch.equal(moved, weight) and torch.equal(stored, zero)


def steps_without_drift(steps, backend):
    weight = orthonormal(2, 4, 16).float()
    buffer = torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for step in range(steps):
        grad = torch.randn(weight.shape, generator=generator)
        grassmann_step_(weight, buffer, grad, 4, 0.05, backend=backend)
        if step % 100 == 99:
            worst = max(worst, drift(weight, 4))
    return worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_bases_stay_orthonormal(backend):
    assert steps_without_drift(2_000, backend) < 1e-6


@pytest.mark.slow
@needs_extension
def test_bases_stay_orthonormal_for_long():
    assert steps_without_drift(100_000, "cpp") < 1e-6


@pytest.mark.parametrize("k", [1, 4, 8])
def test_golden_trajectory(k, shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / f"gcr_k{k}.safetensors")
    lr, momentum, scale = golden["hyper"][3:].tolist()
    weight = golden["weight.0"]
    buffer = torch.zeros_like(weight)
    steps = sum(name.startswith("loss.") for name in golden)
    assert steps >= 4
    for step in range(steps):
        x, labels = golden[f"features.{step}"], golden[f"labels.{step}"]
        leaf = weight.clone().requires_grad_()
        loss = subspace_cross_entropy(x, leaf, labels, k, scale)
        loss.backward()
        expected = {
            "logits": golden[f"logits.{step}"],
            "loss": golden[f"loss.{step}"][0],
            "grad": golden[f"grad.{step}"],
        }
        found = {"logits": subspace_logits(x, weight, k, scale), "loss": loss.detach(), "grad": leaf.grad}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)
        weight, buffer = grassmann_step(weight, buffer, leaf.grad, k, lr, momentum)
        torch.testing.assert_close(weight, golden[f"weight.{step + 1}"], rtol=0, atol=1e-10)


def test_in_place_and_functional_steps_agree():
    tensors = [t.float() for t in motion(5, 4, 24).values()]
    expected = grassmann_step(*tensors, 4, 0.3)
    grassmann_step_(*tensors, 4, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=False))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_backward_after_a_step_in_place_is_refused(backend):
    weight, buffer, grad = (t.float() for t in motion(5, 4, 24).values())
    loss = (weight.requires_grad_() ** 2).sum()
    with torch.no_grad():
        grassmann_step_(weight, buffer, grad, 4, 0.3, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_takes_float32_weights():
    x, weight = normal(5, 12, seed=1).float(), orthonormal(4, 2, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = subspace_logits(x, weight, 2, 25.0)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, subspace_logits(x, weight, 2, 25.0), rtol=2e-2, atol=0.2)


BAD_HEAD = [
    ({"k": 3}, ValueError, "weight must be"),
    ({"k": 0}, ValueError, "k must be a positive"),
    ({"scale": 0.0}, ValueError, "scale"),
    ({"x": torch.zeros(4, 7)}, ValueError, "x must be"),
    ({"x": torch.zeros(4, 6, dtype=torch.float64)}, TypeError, "x must have the dtype"),
    ({"weight": torch.zeros(24, 6), "k": 8}, ValueError, "k must be at most n = 6"),
    ({"target": torch.tensor([0, 1, 2, 4])}, ValueError, r"target must be in \[0, 4\).*got 4"),
    ({"target": torch.tensor([0, 1, -1, 3])}, ValueError, "got -1"),
    ({"target": torch.zeros(4, 3)}, ValueError, r"target must be \(4, 4\)"),
    ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target must be int64"),
    ({"target": torch.zeros(4, 4, requires_grad=True)}, ValueError, "target must not require"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    ({"reduction": "none"}, ValueError, "reduction"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_HEAD)
def test_bad_head_arguments_name_themselves(change, error, message):
    good = {"x": torch.ones(4, 6), "weight": orthonormal(4, 2, 6).float(), "target": torch.arange(4), "k": 2}
    with pytest.raises(error, match=message):
        subspace_cross_entropy(**(good | change))


BAD_STEP = [
    ({"lr": -1.0}, ValueError, "lr"),
    ({"lr": math.nan}, ValueError, "lr"),
    ({"momentum": 1.0}, ValueError, "momentum"),
    ({"mode": "nesterov"}, ValueError, "mode must be one of official"),
    ({"grad": torch.zeros(8, 5)}, ValueError, "grad must be"),
    ({"buffer": torch.zeros(8, 6, dtype=torch.float64)}, TypeError, "buffer must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STEP)
def test_bad_step_arguments_name_themselves(change, error, message):
    weight = orthonormal(4, 2, 6).float()
    good = {"weight": weight, "buffer": torch.zeros_like(weight), "grad": torch.zeros_like(weight), "k": 2, "lr": 0.1}
    with pytest.raises(error, match=message):
        grassmann_step(**(good | change))


HEADS = [spec for spec in specs() if spec.name in ("subspace_logits", "subspace_cross_entropy")]


@pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
@pytest.mark.parametrize("halves", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("spec", HEADS, ids=lambda spec: spec.name)
def test_bfloat16_is_exact_whatever_the_processor_multiplies(spec, halves, monkeypatch):
    monkeypatch.setattr(op, "multiplies_halves", lambda: halves)
    for case in spec.cases:
        check_backend(spec, case, "cpp", torch.bfloat16)


@pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
def test_bfloat16_over_several_chunks(monkeypatch):
    """2^24 projections are a chunk, 128 rows at least: the second one is added to the first."""
    monkeypatch.setattr(op, "multiplies_halves", lambda: True)
    x, labels = normal(150, 4).bfloat16().requires_grad_(), torch.arange(150)
    weight = normal(1 << 17, 4, scale=0.5).bfloat16().requires_grad_()
    loss = subspace_cross_entropy(x, weight, labels, 1, scale=4.0, backend="cpp")
    found = torch.autograd.grad(loss, (x, weight))
    a, w = (t.detach().float().requires_grad_() for t in (x, weight))
    exact = torch.autograd.grad(subspace_cross_entropy(a, w, labels, 1, scale=4.0, backend="cpp"), (a, w))
    for mine, truth in zip(found, exact, strict=True):
        assert (mine.float() - truth).norm() < 2e-2 * truth.norm()


@needs_extension
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_a_gradient_is_kept_as_its_weight_where_products_are_bfloat16(dtypes):
    x, weight = torch.randn(5, 8).to(dtypes[0]), torch.randn(12, 8).to(dtypes[1])
    arguments = (x, weight, torch.zeros(5, dtype=torch.int64), 1.0, 2, 1.0, 0.0, -100, [True, True], "cpp")
    half = multiplies_halves() and dtypes[0] == torch.bfloat16
    expected = [torch.float32, torch.bfloat16 if half else torch.float32]
    assert [t.dtype for t in op.subspace_cross_entropy(*arguments)[1:]] == expected
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        assert [t.dtype for t in op.subspace_cross_entropy(*fake)[1:]] == expected
