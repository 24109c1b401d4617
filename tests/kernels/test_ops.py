"""Rungs 1 and 2, the same for every op: derivatives, registration, compilation, accuracy, determinism."""

import pytest
import torch

from grassland.kernels import dispatch
from grassland.kernels.testing import Case, check_backend, normal, poisoned, run, specs

CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.id}") for spec in specs() for case in spec.cases]
# The simplest case, and the one whose layout no output must take over.
OPCHECKED = [
    pytest.param(spec, case, id=f"{spec.name}-{case.id}")
    for spec in specs()
    for case in spec.cases
    if case is spec.cases[0] or case.id == "strided"
]
SPECS = [pytest.param(spec, id=spec.name) for spec in specs()]
DIFFERENTIABLE = [pytest.param(spec, id=spec.name) for spec in specs() if spec.differentiable]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
needs_extension = pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))


def first(spec) -> Case:
    return spec.cases[0]


@pytest.mark.support(backend="eager", how="run", dtype="float64")
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_eager_equals_reference_in_float64(spec, case):
    truth = run(spec, case.tensors(), case.options, "reference")
    found = run(spec, case.tensors(), case.options, "eager")
    for name, exact in truth.items():
        torch.testing.assert_close(found[name], exact, rtol=0, atol=1e-12 * max(1.0, float(exact.norm())))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_gradcheck(spec, backend):
    tensors = first(spec).tensors()
    names = [name for name, t in tensors.items() if t.requires_grad]

    def call(*values):
        return spec.call(**(tensors | dict(zip(names, values, strict=True))), **first(spec).options, backend=backend)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names])


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_transforms_see_every_derivative(spec):
    """torch.func and forward mode, which no opaque op takes, get the reference; a request for a kernel is refused."""
    tensors, options = first(spec).tensors(), first(spec).options
    names = [name for name, t in tensors.items() if t.requires_grad]
    values = tuple(tensors[name].detach() for name in names)

    def call(*values, **backend):
        out = spec.call(**(tensors | dict(zip(names, values, strict=True))), **options, **backend)
        out = [out] if isinstance(out, torch.Tensor) else out
        return sum(o.double().square().sum() for o in out)

    wanted = torch.autograd.grad(call(*(tensors[name] for name in names)), [tensors[name] for name in names])
    directions = tuple(normal(*v.shape, seed=60 + k) for k, v in enumerate(values))
    found = torch.func.grad(call, argnums=tuple(range(len(values))))(*values)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    slope = sum((g * d).sum() for g, d in zip(wanted, directions, strict=True))
    torch.testing.assert_close(torch.func.jvp(call, values, directions)[1], slope)
    with pytest.raises(dispatch.BackendError, match=r"'eager' takes no transform of torch\.func"):
        torch.func.grad(lambda *v: call(*v, backend="eager"))(*values)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_second_derivatives_of_the_reference_are_the_same_in_any_order(spec):
    """Also of norms that are 0, where PyTorch's own are NaN."""
    tensors, options = first(spec).tensors(), first(spec).options
    names = [name for name, t in tensors.items() if t.requires_grad]
    values = tuple(tensors[name].detach() for name in names)
    for value in values:
        if value.dim() > 1:
            value[0] = 0
    every = tuple(range(len(values)))
    directions = tuple(normal(*v.shape, seed=60 + k) for k, v in enumerate(values))

    def call(*values):
        out = spec.call(**(tensors | dict(zip(names, values, strict=True))), **options, backend="reference")
        out = [out] if isinstance(out, torch.Tensor) else out
        return sum(o.double().square().sum() for o in out)

    def slope(*values):
        return torch.func.jvp(call, values, directions)[1]

    wanted = torch.func.jvp(torch.func.grad(call, every), values, directions)[1]
    leaves = [v.requires_grad_() for v in values]
    gradients = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    for found in (torch.func.grad(slope, every)(*values), torch.autograd.grad(along, leaves)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_a_compiler_sees_every_tangent(spec):
    tensors, options = first(spec).tensors(), first(spec).options
    values = {name: t.detach() for name, t in tensors.items() if t.requires_grad}
    directions = tuple(normal(*v.shape, seed=60 + k) for k, v in enumerate(values.values()))

    def slopes(*values):
        def call(*values):
            out = spec.call(**(tensors | dict(zip(names, values, strict=True))), **options)
            return out if isinstance(out, torch.Tensor) else tuple(out)

        return torch.func.jvp(call, values, directions)[1]

    names = list(values)
    torch._dynamo.reset()
    # The reference of the routing reads its experts on the host.
    compiled = torch.compile(slopes, backend="eager", fullgraph=spec.name != "moe_route")
    torch.testing.assert_close(compiled(*values.values()), slopes(*values.values()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_a_penalty_on_gradients_is_right_or_refused(spec, backend):
    """Also where autograd is asked for single gradients, and looks at nothing else."""

    def penalties(backend):
        tensors = first(spec).tensors(torch.float32)
        wanted = {name: t for name, t in tensors.items() if t.requires_grad}
        out = spec.call(**tensors, **first(spec).options, backend=backend)
        loss = sum(o.square().sum() for o in ([out] if isinstance(out, torch.Tensor) else out))
        gradients = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        return {name: lambda t=t: torch.autograd.grad(penalty, t, retain_graph=True)[0] for name, t in wanted.items()}

    truth = penalties("reference")
    for name, gradient in penalties(backend).items():
        if spec.name == "moe_ffn":
            torch.testing.assert_close(gradient(), truth[name](), rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                gradient()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_a_vectorised_jacobian_is_the_one_row_by_row(spec, backend):
    tensors = first(spec).tensors(torch.float32)
    names = [name for name, t in tensors.items() if t.requires_grad]

    def call(*values):
        out = spec.call(**(tensors | dict(zip(names, values, strict=True))), **first(spec).options, backend=backend)
        return out if isinstance(out, torch.Tensor) else tuple(o for o in out if o.requires_grad)

    values = tuple(tensors[name].detach() for name in names)
    wanted, found = (torch.autograd.functional.jacobian(call, values, vectorize=many) for many in (False, True))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS)
def test_operators_keep_their_dtypes_under_autocast(spec, dtype):
    for operator, arguments in spec.registered(first(spec).tensors(torch.float32), first(spec).options, "eager"):
        seen = []
        for enabled in (False, True):
            values = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            with torch.autocast("cpu", dtype, enabled=enabled):
                out = operator(*values)
            out = [out] if isinstance(out, torch.Tensor) else list(out or ())
            seen.append([*out, *(v for v in values if isinstance(v, torch.Tensor))])
        for a, b in zip(*seen, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_reference_of_halves_is_exact_and_of_the_dtypes_of_eager(spec, dtype):
    truth = run(spec, first(spec).tensors(rounded=dtype), first(spec).options, "reference", rounded=dtype)
    eager = run(spec, first(spec).tensors(dtype), first(spec).options, "eager")
    found = run(spec, first(spec).tensors(dtype), first(spec).options, "reference")
    for name, exact in truth.items():
        assert found[name].dtype == eager[name].dtype, name
        allowed = 2 * torch.finfo(dtype).eps * max(1.0, float(exact.norm()))
        assert torch.linalg.vector_norm(found[name].double() - exact) <= allowed, name


@pytest.mark.parametrize("spec", SPECS)
def test_meta_tensors_have_the_outputs_of_real_ones(spec):
    real = run(spec, first(spec).tensors(torch.float32), first(spec).options, "eager")
    with torch.autocast("cpu", torch.bfloat16):  # of another device
        found = run(spec, first(spec).tensors(torch.float32, "meta"), first(spec).options, "")
    assert all(t.is_meta for t in found.values())
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in real.items()}


@needs_extension
@pytest.mark.support(backend="cpp", how="run")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_cpp_accuracy(spec, case, dtype):
    check_backend(spec, case, "cpp", dtype)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize(("spec", "case"), OPCHECKED)
def test_opcheck(spec, case, backend):
    for operator, arguments in spec.registered(case.tensors(torch.float32), case.options, backend):
        torch.library.opcheck(operator.op, arguments)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_to_one_graph(spec, backend):
    case = first(spec)
    tensors = case.tensors(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: spec.call(**t, **case.options, backend=backend), fullgraph=True)
    wanted = [t for t in tensors.values() if t.requires_grad and spec.differentiable]
    outputs = []
    for function in (compiled, lambda **t: spec.call(**t, **case.options, backend=backend)):
        out = function(**tensors)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        grads = torch.autograd.grad(sum(o.square().sum() for o in out), wanted) if wanted else ()
        outputs.append([*out, *grads])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


@needs_extension
@pytest.mark.support(backend="cpp", how="run")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_bitwise_determinism(spec, dtype):
    case = spec.representative
    with poisoned():
        runs = [run(spec, case.tensors(dtype), case.options, "cpp") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@needs_extension
@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_expanded_gradient(spec):
    """The gradient of a sum has stride 0 everywhere."""
    case = first(spec)
    grads = []
    for expand in (True, False):
        tensors = case.tensors(torch.float32)
        out = spec.call(**tensors, **case.options, backend="cpp")
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        cotangents = [torch.ones(()).expand(o.shape) if expand else torch.ones(o.shape) for o in out]
        grads.append(torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad], cotangents))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.support(how="run")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_gpu_accuracy(spec, case, backend, dtype):
    if backend not in spec.backends:
        pytest.skip(f"{spec.name} has no {backend} kernel")
    check_backend(spec, case, backend, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.support(backend="triton", how="run")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_gpu_representative(spec, dtype):
    check_backend(spec, spec.representative, "triton", dtype, "cuda")
    runs = [run(spec, spec.representative.tensors(dtype, "cuda"), spec.representative.options, "triton") for _ in "ab"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "subspace_cross_entropy"])
def test_a_mean_loss_has_its_gradients_ready(name, backend):
    """On a CPU backward() hands over what the forward saved; another factor passes over it, and is right."""
    spec = next(spec for spec in specs() if spec.name == name)
    case = first(spec)

    def gradients(factor):
        tensors = {key: t.detach().float() if t.is_floating_point() else t for key, t in case.tensors().items()}
        leaves = [tensors[key].requires_grad_() for key in ("x", "weight")]
        loss = factor * spec.call(**tensors, **case.options, backend=backend)
        with Shapes() as written:
            loss.backward()
        return [leaf.grad for leaf in leaves], [tuple(leaf.shape) in written.of_products for leaf in leaves]

    plain, passed = gradients(1)
    assert passed == [False, False]
    third, passed = gradients(1 / 3)
    assert passed == [True, True]
    torch.testing.assert_close([3 * g for g in third], plain)


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Of the tensors that element-wise products write."""

    def __init__(self):
        super().__init__()
        self.of_products = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_):
            self.of_products.add(tuple(out.shape))
        return out
