import os
from pathlib import Path

# Each xdist worker keeps to one core, and so do the processes it starts: threads that wait for a core are slow.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def pytest_collection_modifyitems(config, items):
    """GPU and slow tests run when asked for by -m."""
    asked = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow suite: pytest -m slow"))


@pytest.fixture(scope="session")
def shared():
    """The folder of data sets and golden vectors; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("GRASSLAND_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
