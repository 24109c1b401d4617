import json
import os
from collections import Counter
from pathlib import Path

# Each xdist worker keeps to one core, and so do the processes it starts: threads that wait for a core are slow.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Without it cuBLAS warns wherever a test asks for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def pytest_addoption(parser):
    parser.addoption(
        "--support", type=Path, metavar="FILE", help="write what each op passed on which backend, as JSONL"
    )


def pytest_configure(config):
    path = config.getoption("--support")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportRecord(path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tests marked `support` say what they passed; the reports carry it from xdist's workers to the recorder."""
    report = yield
    if report.when == "call" or report.failed:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        for marker in item.iter_markers("support"):
            values = {**given, **marker.kwargs}
            op = values["op"] if "op" in values else values["spec"].name
            dtype = str(values["dtype"]).removeprefix("torch.")
            report.user_properties.append(("support", [op, values["backend"], dtype, values["how"]]))
    return report


class SupportRecord:
    """Counts outcomes by op, backend, dtype and how it was exercised; one record each when the session ends."""

    def __init__(self, path):
        self.path, self.outcomes = path, Counter()

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "support" and not report.skipped:
                self.outcomes[(*value, report.outcome)] += 1

    def pytest_sessionfinish(self, exitstatus):
        from grassland.kernels.machine import about

        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # interrupted: what has not run would look as if it could not
        facts, lines = about(), []
        for key in sorted({found[:4] for found in self.outcomes}):
            counts = {outcome: self.outcomes[(*key, outcome)] for outcome in ("passed", "failed")}
            record = dict(zip(("op", "backend", "dtype", "how"), key, strict=True))
            lines.append(json.dumps({**record, **counts, **facts}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in lines))


def pytest_collection_modifyitems(config, items):
    """GPU and slow tests run when asked for by -m."""
    asked = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow suite: pytest -m slow"))


@pytest.fixture
def set_threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared():
    """The folder of data sets and golden vectors; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("GRASSLAND_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
