"""What mkdocs does beyond its plugins: generated lists and figures, the tour from its notebook, formulas as MathML.

Everything is made in memory from the repository: the build needs no network and leaves nothing in the source tree.
"""

import functools
import html
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import figures
from latex2mathml.converter import convert
from listings import LISTINGS
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("archs", "kernels", "train")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
MARK = re.compile(r"<!-- table:(\w+) -->\n.*?<!-- end -->", re.DOTALL)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Show mkdocstrings the folders under the names that they are imported by; pages that nav leaves out come last."""
    pages = sorted(str(page.relative_to(config.docs_dir)) for page in Path(config.docs_dir).rglob("*.md"))
    config.nav += [page for page in pages if page not in json.dumps(config.nav)]
    space = Path(tempfile.mkdtemp(prefix="grassland-docs-"))
    (space / "grassland").mkdir()
    for name in PACKAGES:
        (space / "grassland" / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(space)]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the figures, the pictures of benchmarks/results and the tour."""
    for name, draw in figures.FIGURES.items():
        files.append(File.generated(config, f"figures/{name}.svg", content=draw()))
    results = ROOT / "benchmarks/results"
    for picture in sorted(results.rglob("*.png")):
        place = f"results/{picture.relative_to(results).as_posix()}"
        files.append(File.generated(config, place, content=picture.read_bytes()))
    files.append(File.generated(config, "tour.md", content=tour()))
    return files


def tour() -> str:
    """The notebook as a page: its text, and its code without outputs."""
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in sources)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marked places from the benchmarks' tables and the lists of this folder."""
    return MARK.sub(lambda match: content(match[1]), markdown)


@functools.cache
def content(name: str) -> str:
    known = {**LISTINGS, **benchmark_tables()}
    if name not in known:
        raise PluginError(f"no table {name!r}; known: {', '.join(sorted(known))}")
    return known[name]()


def benchmark_tables() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    return tables.TABLES


def on_page_content(markup: str, **_: Any) -> str:
    """TeX to MathML, which browsers show without a script."""
    return FORMULA.sub(lambda match: mathml(html.unescape(match[2]), match[1]), markup)


def mathml(tex: str, tag: str) -> str:
    found = convert(tex.strip(), display="block" if tag == "div" else "inline")
    if "\\" in found or ">&<" in found:
        raise PluginError(f"latex2mathml cannot convert {tex!r}")
    return f'<div class="formula">{found}</div>' if tag == "div" else found
