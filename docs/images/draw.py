"""Draws the pictures of docs/how-it-works.md: ``python docs/images/draw.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
BLUE, ORANGE, GREY, PALE = "#3b6fb6", "#d9822b", "#8a8f98", "#e8ebf0"

# The same bytes in every run, so that a drawing changes when its content does.
mpl.rcParams.update({"svg.hashsalt": "liger_trainer", "font.size": 10, "svg.fonttype": "path"})


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width * 10)
    axes.set_ylim(0, height * 10)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = PALE, **style: object) -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor="#333333", linewidth=0.8, **style))
    dark = colour in (BLUE, ORANGE, GREY)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color="white" if dark else "#222222", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#333333", linewidth=0.9))


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def tiles() -> None:
    figure, axes = canvas(9, 4)
    for left, tiled in ((0, False), (46, True)):
        title = "liger_trainer: one tile at a time" if tiled else "all logits: N x V, and their gradient"
        axes.text(left + 20, 38, title, ha="center", fontsize=10, weight="bold")
        box(axes, left, 8, 6, 24, "hidden\n(N, H)", BLUE)
        box(axes, left + 9, 33, 30, 4, "weight (V, H)", BLUE)
        if tiled:
            axes.add_patch(Rectangle((left + 9, 8), 30, 24, facecolor="none", edgecolor=GREY, linestyle="--"))
            for row in range(1, 4):
                axes.plot([left + 9, left + 39], [8 + 6 * row] * 2, color=GREY, linestyle=":", linewidth=0.8)
            box(axes, left + 9, 20, 30, 6, "one tile of logits,\nthen of their gradient", ORANGE)
            axes.text(left + 24, 4, "dhidden of these rows; dweight += in fp32", ha="center", fontsize=9)
        else:
            box(axes, left + 9, 8, 30, 24, "logits\n(N, V)", ORANGE)
            axes.text(left + 24, 4, "kept until the backward pass", ha="center", fontsize=9)
    save(figure, "tiles.svg")


def products() -> None:
    figure, axes = canvas(9, 3.6)
    rows = (
        ("all logits", ["logits"], ["dhidden", "dweight"], 25, "3 products; N x V kept"),
        ("recomputed", ["logits"], ["logits\nagain", "dhidden", "dweight"], 15, "4 products; a tile"),
        ("liger_trainer", ["logits", "dhidden", "dweight"], ["x g"], 5, "3 products; a tile"),
    )
    axes.text(29, 34, "forward", ha="center", weight="bold")
    axes.text(59, 34, "backward", ha="center", weight="bold")
    axes.plot([44.5, 44.5], [2, 33], color=GREY, linestyle="--", linewidth=0.8)
    for name, forward, backward, y, note in rows:
        axes.text(12, y + 2.5, name, ha="right", va="center", weight="bold" if name == "liger_trainer" else None)
        for index, product in enumerate(forward):
            box(axes, 14 + 10 * index, y, 9, 5, product, ORANGE if product == "logits" else BLUE)
        for index, product in enumerate(backward):
            colour = PALE if product == "x g" else ORANGE if product.startswith("logits") else BLUE
            box(axes, 46 + 10 * index, y, 9, 5, product, colour)
        axes.text(77, y + 2.5, note, va="center", fontsize=8)
    save(figure, "products.svg")


def deferred() -> None:
    figure, axes = canvas(9, 3.4)
    box(axes, 0, 14, 14, 8, "patched head,\nlabels given", BLUE)
    box(axes, 22, 14, 20, 8, "deferred logits:\nhidden, weight", ORANGE)
    axes.text(32, 25.5, "casts, x scale, soft-cap,\nslices, reshapes: recorded", ha="center", va="bottom", fontsize=8)
    axes.add_patch(
        FancyArrowPatch(
            (26, 22.4), (38, 22.4), connectionstyle="arc3,rad=-0.5", arrowstyle="-|>", mutation_scale=9, color="#333333"
        )
    )
    box(axes, 62, 23, 28, 8, "linear_cross_entropy:\nloss, no logits", BLUE)
    box(axes, 62, 4, 28, 8, "the logits, as a tensor:\nthe stock computation", GREY)
    arrow(axes, (14.4, 18), (21.6, 18))
    arrow(axes, (42.4, 19), (61.6, 27))
    arrow(axes, (42.4, 17), (61.6, 8))
    axes.text(50, 26.5, "cross_entropy", ha="center", fontsize=9)
    axes.text(50, 8.5, "anything else", ha="center", fontsize=9)
    save(figure, "deferred.svg")


if __name__ == "__main__":
    tiles()
    products()
    deferred()
