"""What users of the package and of its neighbours rely on: the namespace and lean imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "datasets", "tokenizers", "timm", "torchvision", "triton", "matplotlib", "tyro", "sklearn")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_kernels_is_a_namespace():
    """A regular package called kernels on sys.path would shadow Hugging Face's and break import transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["grassland.archs", "grassland.kernels.plucker", "grassland.train"])
def test_import_is_lean(module):
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import {module}\n"
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    done = python(code)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


def test_no_text_file_has_a_merge_conflict_in_it():
    search = ["git", "grep", "-nIE", "^(<{7}|>{7})"]
    found = subprocess.run(search, cwd=ROOT, capture_output=True, text=True)
    if found.returncode > 1:
        pytest.skip("not a checkout of git")
    assert found.stdout == ""
