"""The ways to install: a wheel with and without the extension, no compiler at all, and what an archive has to build."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("archs", "kernels", "train", "csrc")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, since a build writes beside them."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def build_wheel(tree, **environment):
    done = pip("wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tree / "dist", tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


def backend_after_install(wheel, target):
    """Which backend an installed wheel picks on the CPU, asked in a process that sees nothing of this tree."""
    assert pip("install", "--no-deps", "--target", target, wheel).returncode == 0
    # An editable install in this environment adds its own folders to every namespace: take it out of the way.
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [entry for entry in sys.path if "__editable__" not in entry]
import grassland.archs, grassland.train, grassland.kernels.dispatch as dispatch
assert dispatch.__file__.startswith({str(target)!r}), dispatch.__file__
print(dispatch.describe()["plucker_mix"]["cpu"], "|", grassland.archs.create_model("grassmann_lm_6l").num_parameters())
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_with_extension(tree, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    # What is in the wheel and whether it loads does not depend on the optimiser, which takes most of the time.
    quick = tmp_path / "c++"
    quick.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
    quick.chmod(0o755)
    wheel, log = build_wheel(
        tree, GRASSLAND_BUILD="1", MAX_JOBS="1", CXX=str(quick), NVCC_APPEND_FLAGS="-Xcicc -O0 -Xptxas -O0"
    )
    assert "cp310-abi3" in wheel.name, wheel.name
    assert "grassland: building the extension" in log
    names = zipfile.ZipFile(wheel).namelist()
    assert "grassland/kernels/_C.abi3.so" in names
    assert {"grassland/archs/py.typed", "grassland/kernels/py.typed", "grassland/train/py.typed"} <= set(names)
    assert "grassland/__init__.py" not in names and "grassland/kernels/__init__.py" not in names
    assert backend_after_install(wheel, tmp_path / "site").startswith("cpp |")


def test_pure_python_wheel(tree, tmp_path):
    wheel, log = build_wheel(tree, GRASSLAND_BUILD="0")
    assert "py3-none-any" in wheel.name
    assert "grassland: pure-Python install without the compiled kernels (GRASSLAND_BUILD=0)" in log
    assert backend_after_install(wheel, tmp_path / "site").startswith("eager (the extension is not built")


def test_no_compiler(tree):
    wheel, log = build_wheel(tree, CXX="/nonexistent/c++")
    assert "py3-none-any" in wheel.name
    assert "grassland: pure-Python install without the compiled kernels (no C++ compiler found)" in log


def test_forced_build_fails_without_compiler(tree):
    done = pip(
        "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tree / "dist", tree,
        CXX="/nonexistent/c++", GRASSLAND_BUILD="1",
    )  # fmt: skip
    assert done.returncode != 0
    assert "GRASSLAND_BUILD=1, but the extension cannot be built: no C++ compiler found" in done.stdout + done.stderr


@pytest.mark.parametrize("build", ["0", "1"])
def test_source_archive_has_all_that_the_extension_is_built_from(tree, build):
    if build == "1" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", "dist"]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | {"GRASSLAND_BUILD": build}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {
        str(path.relative_to(tree)) for folder in FOLDERS for path in (tree / folder).rglob("*") if path.is_file()
    }
    assert wanted <= names, wanted - names
