"""What the tests of every op share: cases, the accuracy rule, poisoned memory, ahead-of-time compilation."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one call: `make()` gives float64 CPU tensors by argument name, `options` the other arguments."""

    id: str
    make: Callable[[], Tensors]
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", rounded: torch.dtype = torch.float64
    ) -> Tensors:
        """The inputs as `dtype`, rounded to `rounded` first; the floating-point ones require gradients."""
        return {
            name: t.to(rounded).to(device, dtype).requires_grad_() if t.is_floating_point() else t.to(device)
            for name, t in self.make().items()
        }


@dataclass(frozen=True)
class Spec:
    """One public op as the tests see it.

    call: the public function, called with the tensors and options of a case and `backend`.
    registered: for a case's tensors and a backend, the (operator, arguments) pairs that opcheck examines.
    representative: a realistic shape, whose launches are compiled ahead of time.
    backends: the compiled ones.
    gemm: whether it holds a matrix product that must reach the tensor cores.
    differentiable: whether it has gradients.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    cases: Sequence[Case]
    registered: Callable[[Tensors, dict[str, Any], str], list[tuple[Any, tuple]]]
    representative: Case
    backends: Sequence[str]
    gemm: bool = True
    differentiable: bool = True


def specs() -> list[Spec]:
    """The specs of all ops."""
    modules = [importlib.import_module(f"{__package__}.{name}.cases") for name in dispatch.PACKAGES]
    return [spec for module in modules for spec in module.SPECS]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Float64 on the default device, which is the CPU unless a benchmark says otherwise."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def run(
    spec: Spec, tensors: Tensors, options: dict[str, Any], backend: str, rounded: torch.dtype = torch.float64
) -> Tensors:
    """Outputs and, for fixed random output gradients, the gradient of every floating-point input if there is one."""
    out = spec.call(**tensors, **options, backend=backend)
    outputs: list[Tensor] = [out] if isinstance(out, Tensor) else list(out)
    results: Tensors = {f"out{k}": o.detach() for k, o in enumerate(outputs)}
    wanted = {name: t for name, t in tensors.items() if t.requires_grad and spec.differentiable}
    if wanted:
        cotangents = [normal(*o.shape, seed=100 + k).to(rounded).to(o.device, o.dtype) for k, o in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
        results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def error(found: Tensor, truth: Tensor) -> float:
    return torch.linalg.vector_norm(found.cpu().double() - truth).item()


def check_backend(spec: Spec, case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Against float64 on the same rounded inputs: at most twice the error of eager PyTorch in the same dtype.

    Half an ulp of the norm is added, since eager may by luck be exact on a handful of numbers.
    """
    truth = run(spec, case.tensors(rounded=dtype), case.options, "reference", rounded=dtype)
    eager = run(spec, case.tensors(dtype, device), case.options, "eager")
    with poisoned():
        found = run(spec, case.tensors(dtype, device), case.options, backend)
    for name, exact in truth.items():
        if found[name].dtype != eager[name].dtype or found[name].shape != exact.shape:
            raise AssertionError(f"{spec.name} {case.id} {name}: {found[name].dtype} {tuple(found[name].shape)}")
        allowed = 2 * error(eager[name], exact) + torch.finfo(dtype).eps / 2 * torch.linalg.vector_norm(exact).item()
        actual = error(found[name], exact)
        if not actual <= allowed:
            raise AssertionError(f"{spec.name} {case.id} {name} on {backend}: error {actual:.3e} > {allowed:.3e}")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that an element which a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the launcher made it, ready to be compiled for a chip that is not here."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, backend: str, arch: int | str, warp: int) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=GPUTarget(backend, arch, warp), options=self.options)


def record_launches(call: Callable[[], Any]) -> list[Launch]:
    """Runs `call` with every Triton launch noted down instead of made. The tensors may live on any device."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe_launch(kernel, args, kwargs))

    with unittest.mock.patch.object(JITFunction, "run", note):
        call()
    return launches


def describe_launch(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        # As Triton does: an integer 1 is a constant too.
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        signature[parameter.name] = "constexpr" if parameter.is_constexpr or one else argument_type(value)
        if parameter.is_constexpr or one:
            constexprs[(index,)] = value
        elif isinstance(value, Tensor) or (not parameter.do_not_specialize and multiple_of_16(value)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constexprs, attributes, options)


def multiple_of_16(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0


def argument_type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
        return "*" + (names | {torch.int64: "i64", torch.float64: "fp64", torch.bool: "i1"})[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL (spills are in either), SHARED… of the kernel in a cubin, by the cuobjdump inside triton."""
    import triton

    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = re.findall(r"\b([A-Z]+):(\d+)", text)
    if not usage:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    return {name: int(value) for name, value in usage}
