"""Plots of mask similarities, in the manner of `s3distill.analysis.plots`: inline SVG in the colours of the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from s3distill.analysis.mask_similarity import import_scipy
from s3distill.analysis.plots import INK, PALETTE, new_figure, to_svg
from s3distill.data.similarity_csv import SimilarityMatrix

WIDTH = 8.5  # inches, as wide as the page
MAX_LINES = len(PALETTE)  # of different colours
MAX_LABELLED = 30  # names on the axes of a heat map with a figure in each cell
_STRONGEST = 0.75  # opacity of a cell, such that its figure can still be read on it


def plot_heat_map(title: str, matrix: SimilarityMatrix) -> str:
    """Cells that are the darker the higher their value; the diagonal is left out.

    Returns:
        An ``<svg>`` element.
    """
    size = len(matrix.names)
    figure, axes = new_figure((WIDTH, min(1.2 + 0.5 * size, WIDTH)))
    from matplotlib.patches import Rectangle

    off_diagonal = matrix.values[~np.eye(size, dtype=bool)]
    finite = off_diagonal[np.isfinite(off_diagonal)]
    low, high = (min(0.0, finite.min()), finite.max()) if len(finite) else (0.0, 1.0)
    digits = 2 if high >= 0.1 else 3
    for i in range(size):
        for j in range(size):
            value = matrix.values[i, j]
            if i == j:
                continue
            strength = _STRONGEST * (value - low) / (high - low) if math.isfinite(value) and high > low else 0.0
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=PALETTE[0], alpha=strength, linewidth=0))
            if size <= MAX_LABELLED:
                text = f"{value:.{digits}f}" if math.isfinite(value) else "-"
                axes.text(j, i, text, ha="center", va="center", color=INK, fontsize=8 if size <= 14 else 5)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(size), matrix.names, rotation=90 if size > 8 else 0)
    axes.set_yticks(range(size), matrix.names)
    _title(axes, title)
    return to_svg(figure, f"{title}. {_pairs_in_words(matrix)}")


def plot_dendrogram(title: str, names: Sequence[str], linkage: np.ndarray) -> str:
    """The tree of an average linkage; names that meet further left are more alike."""
    tree = import_scipy("cluster.hierarchy").dendrogram(linkage, no_plot=True, labels=list(names))
    figure, axes = new_figure((WIDTH, 1.0 + 0.3 * len(names)))
    for heights, positions in zip(tree["dcoord"], tree["icoord"], strict=True):
        axes.plot(heights, positions, color=PALETTE[0], linewidth=1.5)
    axes.set_yticks([10 * i + 5 for i in range(len(names))], tree["ivl"])  # scipy's leaves are 10 apart
    axes.set_ylim(10 * len(names), 0)
    axes.set_xlim(left=0)
    axes.set_xlabel("1 - kappa, mean of two branches")
    _title(axes, title)
    merges = _merges_in_words(names, linkage)
    return to_svg(figure, f"{title}. {'; '.join(merges)}.")


def plot_groups(title: str, axis: str, groups: Sequence[str], lines: Mapping[str, Sequence[float]]) -> str:
    """A line per pair over layers or modules; many pairs are thin lines with their mean.

    Args:
        axis: what the groups are.
        lines: label -> a value for each group, NaN where there is none.
    """
    figure, axes = new_figure((WIDTH, 3.2))
    few = len(lines) <= MAX_LINES
    positions = range(len(groups))
    for i, (label, values) in enumerate(lines.items()):
        style = {"color": PALETTE[i], "label": label} if few else {"color": PALETTE[0], "alpha": 0.25}
        axes.plot(positions, values, linewidth=1.5 if few else 0.8, marker="o", markersize=2.5, **style)
    means = [_mean([values[i] for values in lines.values()]) for i in positions]
    if not few:
        axes.plot(positions, means, color=PALETTE[1], linewidth=2, marker="o", markersize=3, label="mean of all pairs")
    step = math.ceil(len(groups) / 32)
    shown = list(positions)[::step]
    long_names = any(len(group) > 2 for group in groups)
    axes.set_xticks(shown, [groups[i] for i in shown], rotation=90 if long_names else 0)
    axes.set_xlabel(axis)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=3)
    _title(axes, title)
    words = ", ".join(f"{group} {mean:.3g}" for group, mean in zip(groups, means, strict=True) if math.isfinite(mean))
    return to_svg(figure, f"{title}. Mean of the pairs by {axis}: {words}.")


def plot_scatter(title: str, x_label: str, y_label: str, x: SimilarityMatrix, y: SimilarityMatrix) -> str:
    """A point per pair of names, one similarity over the other."""
    figure, axes = new_figure((WIDTH, 4.5))
    points = [
        (f"{a} {b}", float(x.values[i, j]), float(y.values[i, j]))
        for i, a in enumerate(x.names)
        for j, b in enumerate(x.names)
        if i < j and math.isfinite(y.values[i, j])
    ]
    axes.plot([p[1] for p in points], [p[2] for p in points], "o", color=PALETTE[0], markersize=4)
    if len(points) <= MAX_LABELLED:
        for label, across, up in points:
            axes.annotate(label, (across, up), (4, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _title(axes, title)
    return to_svg(figure, f"{title}. " + ", ".join(f"{label}: {across:.3g}, {up:.3g}" for label, across, up in points))


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=9)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _pairs_in_words(matrix: SimilarityMatrix) -> str:
    values = matrix.values
    pairs = [(values[i, j], f"{a} and {matrix.names[j]}") for i, a in enumerate(matrix.names) for j in range(i)]
    finite = sorted((pair for pair in pairs if math.isfinite(pair[0])), reverse=True)
    if not finite:
        return "No pair has a value."
    return f"Highest: {finite[0][1]}, {finite[0][0]:.3g}. Lowest: {finite[-1][1]}, {finite[-1][0]:.3g}."


def _merges_in_words(names: Sequence[str], linkage: np.ndarray) -> list[str]:
    clusters = list(names)
    words = []
    for a, b, height, _ in linkage:
        clusters.append(f"{clusters[int(a)]} {clusters[int(b)]}")
        words.append(f"{clusters[int(a)]} joins {clusters[int(b)]} at {height:.3g}")
    return words
