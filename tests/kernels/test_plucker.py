"""What holds for Plücker mixing beyond what every op is tested for."""

import math

import pytest
import torch

from grassland.kernels import dispatch
from grassland.kernels.plucker import gated_blend, op, plucker_coordinates, plucker_mix
from grassland.kernels.plucker.cases import PAPER_OFFSETS, make
from grassland.kernels.plucker.eager import antisymmetric, average
from grassland.kernels.testing import normal

BACKENDS = ["reference", "eager"] + ([] if dispatch.extension_error() else ["cpp"])


def plane(rank=6, seed=0):
    return normal(rank, seed=seed), normal(rank, seed=seed + 50)


def test_coordinates_are_antisymmetric_and_ordered():
    a, b = plane()
    p = plucker_coordinates(a, b)
    torch.testing.assert_close(plucker_coordinates(b, a), -p)
    assert plucker_coordinates(a, a).abs().max() == 0
    assert p[0] == a[0] * b[1] - a[1] * b[0]
    assert p[5] == a[1] * b[2] - a[2] * b[1]


def test_mean_of_wedges_is_a_wedge():
    """The quadratic Plücker relations hold for z ^ y: its antisymmetric matrix has rank 2."""
    z = normal(1, 20, 6)
    matrix = antisymmetric(plucker_coordinates(z, average(z, [1, 2, 5], 1e-6)), 6)[0, -1]
    assert torch.linalg.svdvals(matrix)[2:].max() < 1e-14 < torch.linalg.svdvals(matrix)[1]
    p = {(i, j): matrix[i, j] for i in range(6) for j in range(6)}
    relation = p[0, 1] * p[2, 3] - p[0, 2] * p[1, 3] + p[0, 3] * p[1, 2]
    assert abs(relation) < 1e-14


def test_normalised_coordinates_depend_on_the_plane_alone():
    """Invariant under every change of basis of the pair with positive determinant."""
    a, b = plane()
    for m in ([[2.0, 1.0], [0.5, 3.0]], [[0.0, -1.0], [1.0, 0.0]], [[1e3, 5.0], [2.0, 1e-2 + 0.01]]):
        (q, r), (s, t) = m
        assert q * t - r * s > 0
        p, moved = plucker_coordinates(a, b), plucker_coordinates(q * a + r * b, s * a + t * b)
        torch.testing.assert_close(moved / moved.norm(), p / p.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_bitwise(backend, dtype):
    """Token 11 and what follows change; nothing before it does, to the last bit."""
    tensors = {name: t.to(dtype) for name, t in make(2, 20, 8, 12).items()}
    before = plucker_mix(**tensors, offsets=(1, 2, 4), backend=backend)
    tensors["z"][:, 11:] = normal(2, 9, 8, seed=9).to(dtype)
    after = plucker_mix(**tensors, offsets=(1, 2, 4), backend=backend)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_of_a_batch_is_what_it_is_alone(backend):
    tensors = {name: t.float() for name, t in make(5, 33, 16, 24).items()}
    whole = plucker_mix(**tensors, offsets=(1, 3), backend=backend)
    alone = plucker_mix(tensors["z"][2:3], tensors["weight"], tensors["bias"], offsets=(1, 3), backend=backend)
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("angle", [1e-2, 1e-3])
def test_near_parallel_pairs_keep_their_accuracy(backend, angle):
    """One pair nearly parallel, another not: |z|^2 |s|^2 - <z,s>^2 in float32 would be wrong by half at 1e-3."""
    z = normal(1, 3, 16).float().double()
    other = torch.nn.functional.normalize(
        z[:, 1] - (z[:, 1] * z[:, 2]).sum() / z[:, 2].square().sum() * z[:, 2], dim=-1
    )
    z[:, 1] = (z[:, 2] * math.cos(angle) + other * z[:, 2].norm() * math.sin(angle)).float().double()
    weight = normal(24, 120, seed=1).float()
    exact = plucker_mix(z, weight.double(), offsets=(1, 2), backend="reference")[:, 2]
    found = plucker_mix(z.float(), weight, offsets=(1, 2), backend=backend)[:, 2]
    # Rounding delta to float32 costs an ulp of |z| over |delta|.
    assert (found - exact).norm() / exact.norm() < 4 * torch.finfo(torch.float32).eps / angle


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_token_gives_nothing(backend):
    """A token equal to its partner spans no plane: its coordinates are exactly zero, and so is what they add."""
    z = normal(1, 1, 8).float().expand(1, 6, 8)
    g = plucker_mix(z, normal(5, 28).float(), offsets=(1,), backend=backend)
    assert g.abs().max() == 0


@pytest.mark.skipif(dispatch.extension_error() is not None, reason="the extension is not built")
@pytest.mark.parametrize("rank", [3, 15, 16, 17, 33, 48, 49, 64, 81])
def test_cpp_rows_that_fill_vectors_or_do_not(rank):
    """More offsets than lanes, ranks about the multiples of a vector and of the columns held in registers."""
    offsets = list(range(1, 20))
    tensors = {name: t.requires_grad_() for name, t in make(2, 24, rank, 5).items()}
    exact = plucker_mix(**tensors, offsets=offsets, backend="eager")
    found = plucker_mix(**{k: t.float() for k, t in tensors.items()}, offsets=offsets, backend="cpp")
    grad = normal(*exact.shape, seed=7)
    close = {"rtol": 1e-4, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(found, exact, **close)
    inputs = list(tensors.values())
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad.float()), torch.autograd.grad(exact, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **close)


def test_backward_keeps_the_reduced_tokens_alone():
    """O(T r) and the weight, not O(T m K): the wedge is built again."""
    tensors = {name: t.float().requires_grad_() for name, t in make(2, 64, 32, 16).items()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        plucker_mix(**tensors, offsets=PAPER_OFFSETS).sum().backward()
    assert sum(kept.values()) == sum(tensors[name].untyped_storage().nbytes() for name in ("z", "weight"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_float32_tokens_beside_a_half_weight(backend):
    tensors = {name: t.float() for name, t in make(2, 12, 8, 6).items()}
    half = {name: t if name == "z" else t.bfloat16() for name, t in tensors.items()}
    out = plucker_mix(**half, offsets=(1, 2), backend=backend)
    assert out.dtype == torch.bfloat16
    exact = plucker_mix(**{name: t.double() for name, t in half.items()}, offsets=(1, 2), backend="reference")
    assert (out - exact).norm() / exact.norm() < 2**-7


def test_the_smallest_norm_that_is_divided_by_is_a_millionth():
    z, weight = 1e-4 * torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    wedges = plucker_coordinates(z[:, 1:], z[:, :-1])
    assert (wedges.norm(dim=-1) < 1e-6).all()
    torch.testing.assert_close(plucker_mix(z, weight, offsets=(1,))[:, 1:], wedges / 1e-6 @ weight.T)


def test_the_reference_multiplies_halves_in_float32():
    """As the transforms of torch.func get it: the coordinates of these tokens are no float16."""
    z, weight = 400 * normal(1, 6, 4).half(), normal(5, 6, seed=1).half()
    found = plucker_mix(z, weight, offsets=(1, 2), backend="reference")
    exact = plucker_mix(z.double(), weight.double(), offsets=(1, 2), backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


def test_autocast_casts_the_weight_and_not_the_tokens():
    tensors = {name: t.float() for name, t in make(2, 12, 8, 6).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = plucker_mix(**tensors, offsets=(1, 2))
        blended = gated_blend(tensors["z"], tensors["z"], torch.eye(8, 16), torch.zeros(8))
    half = {name: t if name == "z" else t.bfloat16() for name, t in tensors.items()}
    assert torch.equal(found, plucker_mix(**half, offsets=(1, 2)))
    assert blended.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.zeros(3, 4)}, ValueError, r"z must be \(B, T, r\) with r >= 2, got \(3, 4\)"),
        ({"z": torch.zeros(1, 3, 1)}, ValueError, "z must be"),
        ({"z": torch.zeros(1, 3, 4, dtype=torch.int64)}, TypeError, "z must be float32, bfloat16"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight must be \(d, 6\) for r = 4, got \(5, 7\)"),
        ({"weight": torch.zeros(5, 6).double()}, TypeError, "weight must have the dtype of z"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias must have the dtype of weight"),
        ({"weight": torch.zeros(5, 6, device="meta")}, ValueError, "weight must be on the device of z"),
        ({"offsets": ()}, ValueError, "offsets must be one or more positive integers"),
        ({"offsets": (1, 0)}, ValueError, "offsets must be"),
        ({"offsets": (1.5,)}, ValueError, "offsets must be"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
        ({"backend": "fast"}, ValueError, "backend must be one of reference, eager, cpp, triton, cuda, got 'fast'"),
        ({"backend": "cuda"}, dispatch.BackendError, "backend 'cuda' is not available: the cuda backend takes cuda"),
    ],
)
def test_bad_input_names_itself(change, error, message):
    arguments = {"z": torch.zeros(1, 3, 4), "weight": torch.zeros(5, 6), "bias": torch.zeros(5), "offsets": (1,)}
    with pytest.raises(error, match=message):
        plucker_mix(**(arguments | change))


def test_blend_names_what_is_wrong():
    x, weight, bias = torch.zeros(2, 4), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="g must have the shape of x"):
        gated_blend(x, torch.zeros(3, 4), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \(4, 8\) for d = 4"):
        gated_blend(x, x, torch.zeros(4, 4), bias)
    with pytest.raises(TypeError, match="bias must have the dtype of g"):
        gated_blend(x, x, weight, bias.double())


def test_environment_chooses_the_backend(monkeypatch):
    tensors = {name: t.float() for name, t in make(1, 4, 4, 3).items()}
    monkeypatch.setenv(dispatch.ENVIRONMENT, "nonsense")
    with pytest.raises(ValueError, match=r"\$GRASSLAND_BACKEND must be one of"):
        plucker_mix(**tensors, offsets=(1,))
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(dispatch.BackendError, match="takes cuda tensors, got cpu"):
        plucker_mix(**tensors, offsets=(1,))


def test_compiled_backend_refuses_float64_by_name():
    tensors = make(1, 4, 4, 3)
    with pytest.raises(dispatch.BackendError, match="takes float32, bfloat16, got float64"):
        plucker_mix(**tensors, offsets=(1,), backend="cpp")
    plucker_mix(**tensors, offsets=(1,))


def test_cuda_is_the_first_choice_for_the_sizes_it_takes(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)

    def chosen(rank, offsets):
        unfit = op.unfit(torch.empty(1, 1, rank), list(offsets))
        return dispatch.fastest(op.OP, torch.device("cuda"), torch.float32, unfit)

    assert chosen(128, range(1, 65)) == "cuda"
    assert chosen(129, [1]) == chosen(2, range(1, 66)) == "triton"
