"""Folder mapping and the compiled extension; everything else is in pyproject.toml.

GRASSLAND_BUILD=0 installs pure Python, GRASSLAND_BUILD=1 fails when the extension cannot be built.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = {"grassland.archs": "archs", "grassland.kernels": "kernels", "grassland.train": "train"}
# LibTorch stable ABI of torch 2.11 (and, by py_limited_api, of Python 3.10): one build serves every later version.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CUDA_ARCHS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100")]
# Chips of a later generation, as sm_120, run none of these: they compile this PTX when they load it.
CUDA_ARCHS.append("-gencode=arch=compute_80,code=compute_80")
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
FORCE = os.environ.get("GRASSLAND_BUILD", "")


def packages() -> list[str]:
    found = []
    for name, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            package = ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
            if package not in found:
                found.append(package)
    return found


def compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def cuda_home() -> str | None:
    """The CUDA toolkit, nvcc and headers. The nvcc on the path may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in [os.environ.get("CUDA_HOME"), *beside, "/usr/local/cuda"]:
        if home and (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return home
    return None


def sources(suffix: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob(f"*{suffix}"))]


def extension() -> dict:
    """Arguments for setup() that build grassland.kernels._C, or {} for a pure-Python install."""
    if FORCE == "0":
        return skip("GRASSLAND_BUILD=0")
    if compiler() is None:
        return skip("no C++ compiler found")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return skip("torch is not importable here: install torch first, then use pip install --no-build-isolation")
    cuda = torch.version.cuda is not None and cuda_home() is not None
    if cuda:
        cpp_extension.CUDA_HOME = cuda_home()
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    ext = kind(
        "grassland.kernels._C",
        sources(".cpp") + (sources(".cu") if cuda else []),
        extra_compile_args={
            "cxx": CXX_FLAGS + ABI_FLAGS,
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", *ABI_FLAGS, *CUDA_ARCHS],
        },
        py_limited_api=True,
    )
    print(f"grassland: building the extension ({'C++ and CUDA' if cuda else 'C++'})")
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def skip(reason: str) -> dict:
    if FORCE == "1":
        raise SystemExit(f"grassland: GRASSLAND_BUILD=1, but the extension cannot be built: {reason}")
    print(f"grassland: pure-Python install without the compiled kernels ({reason})")
    return {}


setup(package_dir=FOLDERS, packages=packages(), package_data={name: ["py.typed"] for name in FOLDERS}, **extension())
