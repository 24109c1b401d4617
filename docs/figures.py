"""The figures of the documentation, drawn from the mathematics: `python docs/figures.py FOLDER [NAME …]`
writes them; `docs slots` the one that README.md shows.
"""

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

from grassland.archs import MHC, KromHC
from grassland.kernels.moe import moe_route

GREEN, BLUE, ORANGE, GREY, LIGHT = "#2f7d4f", "#3465a4", "#c4742c", "#7d8783", "#e8efe9"
Array = np.ndarray


def svg(figure: Figure) -> str:
    """The figure as SVG, the same text for the same figure."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "grassland"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, facecolor="white")
    return text.getvalue()


def blank(axes: Axes, x: tuple[float, float], y: tuple[float, float], title: str = "") -> None:
    axes.set(xlim=x, ylim=y, aspect="equal", title=title)
    axes.title.set_fontsize(10)
    axes.axis("off")


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = GREY, height: float = 0.5) -> None:
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "fc": LIGHT, "ec": colour, "lw": 1.5}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: Any, end: Any, colour: str = "black", bend: float = 0.0, style: str = "-|>") -> None:
    look = {"arrowstyle": style, "mutation_scale": 11, "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look))


def slots() -> str:
    """One block with its slots, between embedding and head."""
    figure = Figure(figsize=(8.6, 2.6), layout="constrained")
    axes = figure.subplots()
    blank(axes, (-0.4, 11.4), (-0.75, 2.35))
    axes.add_patch(FancyBboxPatch((1.75, -0.55), 6.6, 2.6, boxstyle="round,pad=0.05", fc="none", ec=GREY, ls="--"))
    axes.text(8.3, -0.42, "× depth", ha="right", color=GREY, fontsize=9)
    arrow(axes, (0.65, 0), (9.35, 0))
    box(axes, 0.2, 0, 1.1, "embedding")
    for x, name, colour in ((3.3, "mixer", GREEN), (6.5, "ffn", ORANGE)):
        arrow(axes, (x - 0.75, 0), (x - 0.5, 1.05), GREY, -0.35)
        arrow(axes, (x + 0.5, 1.05), (x + 0.75, 0.18), GREY, -0.35)
        box(axes, x, 1.2, 1.1, name, colour)
        box(axes, x + 0.9, 0, 1.0, "residual", BLUE)
    axes.text(3.3, 1.68, "tokens to tokens", ha="center", fontsize=8)
    axes.text(6.5, 1.68, "channels to channels", ha="center", fontsize=8)
    axes.text(4.2, -0.42, "how a branch joins the stream", ha="left", fontsize=8)
    box(axes, 9.9, 0, 1.0, "head", "#7b4fa0")
    axes.text(9.9, 0.42, "features to logits", ha="center", fontsize=8)
    return svg(figure)


def span(axes: Axes, a: Array, b: Array, colour: str, label: str) -> None:
    """The parallelogram of two vectors."""
    axes.add_patch(Polygon([(0, 0), a, a + b, b], fc=colour, ec=colour, alpha=0.22))
    arrow(axes, (0, 0), b, colour)
    axes.text(*(b * (1 + 0.14 / np.linalg.norm(b))), label, color=colour, fontsize=9, ha="center", va="center")


def plucker() -> str:
    """The causal pairs of a token, and the mean of their normalised wedges as one wedge, computed."""
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    pairs, wedges, mean = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    blank(pairs, (-0.5, 8.5), (-1.1, 3.4), "pairs of token t, offsets 1, 2, 4")
    for index in range(8):
        box(pairs, index + 0.2, 0, 0.72, f"$z_{{t{index - 7 if index < 7 else ''}}}$", GREEN if index == 7 else GREY)
    for offset, colour in ((1, GREEN), (2, BLUE), (4, ORANGE)):
        arrow(pairs, (7.2 - offset, 0.3), (7.2, 0.3), colour, -0.75 if offset > 1 else -1.1)
    z = np.array([1.35, 0.15])
    past = {GREEN: np.array([0.55, 0.75]), BLUE: np.array([-0.3, 0.95]), ORANGE: np.array([0.95, -0.6])}
    blank(wedges, (-0.75, 2.6), (-0.9, 1.75), r"$z_t\wedge z_{t-\Delta}$: the plane, not the vectors")
    for (colour, vector), offset in zip(past.items(), (1, 2, 4), strict=True):
        span(wedges, z, vector, colour, f"$z_{{t-{offset}}}$")
    arrow(wedges, (0, 0), z)
    wedges.text(z[0] + 0.1, z[1] - 0.02, "$z_t$", fontsize=9)
    areas = [z[0] * v[1] - z[1] * v[0] for v in past.values()]
    y = sum(v / abs(area) for v, area in zip(past.values(), areas, strict=True)) / len(past)
    blank(mean, (-0.75, 2.6), (-0.9, 1.75), r"$\frac{1}{n}\sum\hat p_\Delta = z_t\wedge y_t$")
    span(mean, z, y, GREY, "$y_t$")
    arrow(mean, (0, 0), z)
    mean.text(z[0] + 0.1, z[1] - 0.02, "$z_t$", fontsize=9)
    total, signs = z[0] * y[1] - z[1] * y[0], sum(map(np.sign, areas)) / len(areas)
    mean.text(0.9, -0.7, f"$p_{{01}}$: mean {signs:.3f} = wedge {total:.3f}", ha="center", fontsize=8)
    return svg(figure)


def kromhc() -> str:
    """The butterfly of four streams, and the deviation of products of mixing matrices, measured."""
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    blank(left, (-0.7, 4.3), (-0.6, 3.6), r"$H^{res}X=(U^1\otimes U^2)X$ as two stages of differences")
    for stream in range(4):
        left.text(-0.15, 3 - stream, f"$x_{stream}$", ha="right", va="center", fontsize=10)
        arrow(left, (0, 3 - stream), (4, 3 - stream), GREY)
    for centre, distance, q, colour in ((1.1, 2, "q_1", GREEN), (2.9, 1, "q_2", BLUE)):
        lower = [s for s in range(4) if not s & distance]
        for shift, stream in enumerate(lower):
            x = centre + (shift - 0.5) * 0.7
            arrow(left, (x, 3 - stream), (x, 3 - stream - distance), colour, style="<|-|>")
        left.text(centre, 3.35, f"$e={q}(x_a-x_b)$", ha="center", fontsize=8.5, color=colour)
        left.text(centre, -0.45, "$x_a-e$, $x_b+e$", ha="center", fontsize=8.5, color=colour)
    for name, cls, colour in (("mHC, 20 Sinkhorn steps", MHC, ORANGE), ("KromHC", KromHC, GREEN)):
        right.semilogy(range(1, 25), deviations(cls), "o-", ms=3, color=colour, label=name)
    right.set(xlabel="sublayers multiplied", ylabel="largest |row or column sum − 1|")
    right.set_title("random logits, float32 matrices", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return svg(figure)


def deviations(cls: type, depth: int = 24, streams: int = 4, dim: int = 16) -> list[float]:
    """How far the product of the first 1, 2, … mixing matrices is from doubly stochastic; the product in float64."""
    generator = torch.Generator().manual_seed(0)
    x, product, found = torch.randn(8, streams, dim, generator=generator), torch.eye(streams).double(), []
    for index in range(depth):
        layer = cls(None, dim, index, num_streams=streams)
        torch.nn.init.normal_(layer.static_alpha, std=3.0, generator=generator)
        product = layer.coefficients(x)[2].detach().double() @ product
        sums = torch.cat([product.sum(-1), product.sum(-2)])
        found.append(max((sums - 1).abs().max().item(), math.ulp(1.0)))
    return found


def moe() -> str:
    """Blocks with norms of their own around one mixer and one set of experts, and tokens routed to places, computed."""
    figure = Figure(figsize=(9.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    blank(left, (-0.3, 5.3), (-0.4, 3.3), "every block has its norms, all share the rest")
    box(left, 1.2, 2.8, 1.5, "one mixer", GREEN)
    box(left, 3.9, 2.8, 1.9, "one set of experts", ORANGE)
    for index in range(3):
        x = 0.6 + 1.9 * index
        box(left, x, 0.7, 1.5, f"block {index + 1}:\nnorms", BLUE, 0.8)
        arrow(left, (x - 0.25, 1.15), (1.2, 2.5), GREEN, style="<|-|>")
        arrow(left, (x + 0.25, 1.15), (3.9, 2.5), ORANGE, style="<|-|>")
        if index < 2:
            arrow(left, (x + 0.78, 0.7), (x + 1.12, 0.7))
    generator = torch.Generator().manual_seed(3)
    routing = moe_route(torch.randn(10, 4, generator=generator), top_k=2, capacity=6)
    blank(right, (-0.9, 10.6), (-0.5, 5.6), "10 tokens, 2 of 4 experts each, 6 places an expert")
    for token in range(10):
        right.plot(token + 0.3, 0.2, "s", color=GREY, ms=7)
    right.text(-0.2, 0.2, "tokens", ha="right", va="center", fontsize=8)
    draw_places(right, routing)
    return svg(figure)


def draw_places(axes: Axes, routing: Any) -> None:
    """The kept pairs as filled places in the order of the counting sort, the dropped ones as dotted lines."""
    order, offsets = routing.order.tolist(), routing.offsets.tolist()
    for expert, colour in enumerate((GREEN, BLUE, ORANGE, "#7b4fa0")):
        left = expert * 2.65 + 0.1
        axes.text(left + 0.95, 5.0, f"expert {expert}", ha="center", fontsize=8, color=colour)
        places = order[offsets[expert] : offsets[expert + 1]]
        for place in range(6):
            x = left + 0.38 * place
            filled = place < len(places)
            axes.plot(x, 4.4, "s", ms=8, mec=colour, mfc=colour if filled else "white")
            if filled:
                axes.plot([places[place] // 2 + 0.3, x], [0.45, 4.1], color=colour, lw=0.7, alpha=0.8)
    dropped = int((routing.slots < 0).sum())
    axes.text(4.9, -0.4, f"{dropped} of 20 pairs dropped, in token order", ha="center", fontsize=8, color=GREY)


def grassmann() -> str:
    """A feature's projection onto a class plane in three dimensions, and the geodesic step of one basis vector."""
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    space: Any = figure.add_subplot(1, 2, 1, projection="3d")
    basis = np.linalg.qr(np.array([[1.0, 0.1], [0.2, 1.0], [0.35, 0.25]]))[0]
    x = np.array([0.35, -0.45, 0.82]) / np.linalg.norm([0.35, -0.45, 0.82])
    shadow = basis @ (basis.T @ x)
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) @ basis.T
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    space.add_collection3d(Poly3DCollection([corners], fc=GREEN, alpha=0.2))
    for vector, colour, text in ((x, BLUE, r"$\hat x$"), (shadow, GREEN, r"$S_iS_i^T\hat x$")):
        space.quiver(0, 0, 0, *vector, color=colour, arrow_length_ratio=0.1)
        space.text(*(1.12 * vector), text, color=colour, fontsize=10)
    space.plot(*np.stack([x, shadow], 1), ls=":", color=GREY)
    space.set(xlim=(-0.9, 0.9), ylim=(-0.9, 0.9), zlim=(-0.5, 0.9))
    space.set_title(
        rf"logit $=\gamma\,\|S_i^T\hat x\|=\gamma\cos\theta$, here ${np.linalg.norm(shadow):.2f}\,\gamma$", fontsize=10
    )
    space.set_axis_off()
    space.view_init(22, -58)
    flat = figure.add_subplot(1, 2, 2)
    blank(flat, (-1.5, 1.9), (-0.35, 1.5), r"step: $S^+=S\cos\sqrt{H}+\Delta\,\mathrm{sinc}\sqrt{H}$")
    angle = 0.7
    arc = np.linspace(0, math.pi, 90)
    flat.plot(np.cos(arc), np.sin(arc), color=GREY, lw=1)
    end = np.array([math.cos(angle), math.sin(angle)])
    for start, stop, colour in (((0, 0), (1, 0), GREEN), ((1, 0), (1, angle), ORANGE), ((0, 0), tuple(end), BLUE)):
        arrow(flat, start, stop, colour)
    flat.text(0.5, -0.16, "$S$", color=GREEN)
    flat.text(1.06, 0.42, r"$\Delta=-\eta\,G$", color=ORANGE, fontsize=9)
    flat.text(*(end * 0.62 + (-0.14, 0.1)), "$S^+$", color=BLUE)
    flat.text(-0.9, 1.2, r"horizontal: $S^T\Delta=0$", fontsize=9)
    return svg(figure)


def traffic() -> str:
    """Elements moved a token by a hyper-connection sublayer, n = 4, in units of the width C."""
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    axes = figure.subplots()
    rows = [("plain residual", 3, 3), ("two kernels", 14, 23), ("boundary-fused", 10, 15)]
    for index, (_, forward, backward) in enumerate(rows):
        axes.barh(index, forward, color=GREEN, label="forward" if index == 0 else None)
        axes.barh(index, backward, left=forward, color=BLUE, label="backward" if index == 0 else None)
        axes.text(forward + backward + 0.4, index, f"{forward + backward} C", va="center", fontsize=9)
    axes.set_yticks(range(3), [name for name, *_ in rows])
    axes.set(xlim=(0, 43), xlabel="elements moved a token, in C")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


FIGURES: dict[str, Callable[[], str]] = {
    draw.__name__: draw for draw in (slots, plucker, kromhc, moe, grassmann, traffic)
}

if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        (folder / f"{name}.svg").write_text(FIGURES[name]())
