"""The documentation: its code runs, its commands exist, its links lead somewhere, it builds without the network."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINKING = [*OUTSIDE, ROOT / "benchmarks/README.md"]
PAGES = [*OUTSIDE, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page, *languages):
    """(first line, text) of the page's code blocks in one of the languages, "" being none."""
    text = page.read_text()
    found = [m for m in FENCE.finditer(text) if m[1] in languages]
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


def pages_with(*languages):
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if blocks(p, *languages)]


def load(name):
    """A module of docs/, which is no package."""
    for package in ("griffe", "tyro", "matplotlib"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def listings():
    return load("listings")


@pytest.fixture
def registry(monkeypatch):
    """What a page registers is gone after its test."""
    from grassland.archs import registry

    for name in ("_CHOICES", "_ASSEMBLIES", "_MODELS"):
        table = getattr(registry, name)
        copy = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
        monkeypatch.setattr(registry, name, copy)


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, tmp_path, monkeypatch, registry):
    """In order, in one namespace; a failure's traceback shows the page's own lines."""
    for package in set(re.findall(r"^import (\w+)|^from (\w+)", page.read_text(), re.MULTILINE)):
        pytest.importorskip(package[0] or package[1])
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def commands(page):
    """The grassland commands of a page's console blocks, as (module, arguments); "…" stands for further options."""
    for _, text in blocks(page, "console", ""):
        for line in text.replace("\\\n", " ").splitlines():
            found = re.search(r"-m (grassland\.[\w.]+)(.*)", line)
            if found:
                yield found[1], [w for w in shlex.split(found[2], comments=True) if w not in ("&&", "…")]


@pytest.mark.parametrize("page", pages_with("console", ""))
def test_commands_and_their_options_exist(page, listings):
    from grassland.train.__main__ import COMMANDS

    for module, arguments in commands(page):
        if module == "grassland.kernels.bench":
            listings.parse_bench(arguments)
            continue
        assert module == "grassland.train", module
        assert arguments[0] in COMMANDS, arguments[0]
        asked = listings.ask(arguments[0], arguments[1:])
        assert asked is not None or arguments[1:] == [], f"{arguments[0]} takes no options"


def test_option_parser_is_asked(listings):
    """The harness of the test above can fail."""
    with pytest.raises(SystemExit):
        listings.ask("lm", ["--no-such-option", "1"])
    assert listings.ask("lm", ["--lr", "0.5"]).found.lr == 0.5


def test_readme_picture_is_the_figure_of_the_site():
    """Where the matplotlib that drew it is installed: another one may draw the same with other text."""
    committed, drawn = (DOCS / "slots.svg").read_text(), load("figures").FIGURES["slots"]()
    drawer = re.compile(r"Matplotlib v[\d.]+")
    if drawer.findall(committed) != drawer.findall(drawn):
        pytest.skip(f"drawn by {drawer.findall(committed)}")
    assert committed == drawn, "python docs/figures.py docs slots"


def anchors(page):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in LINKING])
def test_links_to_files(page):
    """Those inside the site are the build's to check: it knows what is generated."""
    for link in LINK.findall(page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_command_preset_and_recipe_is_listed(listings):
    from grassland.archs import list_models
    from grassland.train.__main__ import COMMANDS
    from grassland.train.compare.presets import PRESETS
    from grassland.train.recipes import RECIPES

    presets, recipes, options = listings.presets(), listings.recipes(), listings.options()
    assert all(f"| `{name}` |" in presets for name in list_models())
    assert all(f"| `vision --recipe {name}` |" in recipes for name in RECIPES)
    comparisons = listings.comparisons()
    assert all(f"| `{name}` |" in comparisons for name in PRESETS)
    assert all(f"## `{name}` {{#{name}}}" in options for name in COMMANDS)
    assert "| `--subspace-dim` | integer | `8` | Dimension k of a Grassmann head's class subspaces. |" in options


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, with every socket to another machine refused."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "matplotlib", "tyro"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("site")
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('the build must need no network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--site-dir', {str(out)!r}])"
    )
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_builds_and_stands_alone(site):
    """No page loads a script, a style or a font from elsewhere, and no formula or table is left unfilled."""
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}
    for name, text in pages.items():
        foreign = r'<(?:script|img)[^>]+src="http[^"]*|<link[^>]+rel="stylesheet"[^>]+href="http[^"]*'
        assert re.findall(foreign, text) == [], name
        assert "arithmatex" not in text, name
        assert "<!-- table:" not in text, name
    assert "<math" in pages["slots/mixer/index.html"]
    assert "13,001,920" in pages["recipes/index.html"]


def test_public_contract_is_in_the_reference(site):
    import grassland.archs as archs

    pages = "".join((site / f"api/{name}/index.html").read_text() for name in ("archs", "kernels", "train"))
    assert [name for name in archs.__all__ if f'id="grassland.archs.{name}"' not in pages] == []
    ops = (
        "plucker.plucker_mix",
        "subspace.subspace_logits",
        "subspace.subspace_cross_entropy",
        "subspace.grassmann_step",
        "cross_entropy.linear_cross_entropy",
    )
    assert [name for name in ops if f'id="grassland.kernels.{name}"' not in pages] == []
    assert 'id="grassland.train.optim.build_optimizer"' in pages


def test_tour_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib", "tokenizers", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is committed without outputs"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "test accuracy" in printed
