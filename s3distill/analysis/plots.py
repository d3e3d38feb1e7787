"""Plots of the report as inline SVG, in the colours of the page that they stand in, light or dark."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from s3distill.analysis.curves import Curve

PALETTE = ("#3b82c4", "#d9822b", "#2f9e62", "#b5508f", "#8a7a1f", "#7a6fd0")  # readable on white and on near-black
INK = "#010203"  # stands for the page's text colour until the SVG is written
KeptUnits = Sequence[tuple[int, int]]


def plot_curves(
    title: str, curves: dict[str, Curve], right: dict[str, Curve] | None = None, log: bool = False, over: str = "update"
) -> str:
    """Lines over the number of updates, or over something else that stands in their place.

    Args:
        title: heading, and what a screen reader says first.
        curves: by label; ``right`` is drawn dashed against an axis of its own.
        log: logarithmic left axis.
        over: what is on the horizontal axis.
    Returns:
        An ``<svg>`` element.
    """
    figure, axes = new_figure((7.2, 3.0))
    _draw(axes, curves, PALETTE, "-")
    handles = list(axes.lines)
    if log:
        axes.set_yscale("log")
    if right:
        twin = axes.twinx()
        _style(twin)
        _draw(twin, right, PALETTE[len(curves) % len(PALETTE) :] + PALETTE, "--")
        handles += list(twin.lines)
        twin.set_ylabel(", ".join(right))
    axes.set_xlabel("updates" if over == "update" else over)
    axes.set_title(title, loc="left", color=INK, fontsize=9)
    if len(handles) > 1:
        axes.legend(handles=handles, frameon=False, labelcolor=INK, loc="best")
    return to_svg(figure, f"{title}. " + " ".join(_in_words(curves | (right or {}), over)))


def plot_kept_units(kept: dict[str, KeptUnits]) -> str:
    """Bars of what stayed (full) of what there was (pale), per layer; one panel per kind of unit, as in ``{"head": [(5, 12), ...]}``."""
    names = {"conv": "conv channels", "head": "attention heads", "ffn": "FFN dims"}
    figure, all_axes = new_figure((9.0, 2.8), len(kept))
    words = []
    for axes, (unit, layers), colour in zip(all_axes, kept.items(), PALETTE, strict=False):
        positions = range(len(layers))
        axes.bar(positions, [total for _, total in layers], color=colour, alpha=0.25, label="teacher")
        bars = axes.bar(positions, [count for count, _ in layers], color=colour, label="student")
        axes.bar_label(bars, fontsize=7, color=INK)
        axes.set_xticks(list(positions))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_title(names.get(unit, unit), loc="left", color=INK, fontsize=9)
        words.append(
            f"{names.get(unit, unit)}: "
            + ", ".join(f"layer {i} {count} of {total}" for i, (count, total) in enumerate(layers))
        )
    return to_svg(figure, "Kept units per layer. " + "; ".join(words))


def new_figure(size: tuple[float, float], num_panels: int = 1) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "plots need matplotlib, which is not installed; run: pip install 's3distill[plots]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    panels = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for axes in panels:
        _style(axes)
    return figure, panels[0] if num_panels == 1 and size[0] < 9 else panels


def _style(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=8)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
        part.set_fontsize(9)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))


def _draw(axes: Any, curves: dict[str, Curve], colours: Sequence[str], style: str) -> None:
    for i, (label, curve) in enumerate(curves.items()):
        points = _finite(curve)
        marker = "o" if len(points) < 3 else None  # one point makes no line
        axes.plot(
            [u for u, _ in points],
            [v for _, v in points],
            style,
            color=colours[i % len(colours)],
            label=label,
            linewidth=1.5,
            marker=marker,
        )


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(u, v) for u, v in zip(curve.updates, curve.values, strict=True) if math.isfinite(v)]


def _in_words(curves: dict[str, Curve], over: str) -> Iterable[str]:
    for label, curve in curves.items():
        points = _finite(curve)
        if points:
            (first, start), (last, end) = points[0], points[-1]
            yield f"{label}: {start:.4g} at {over} {first}, {end:.4g} at {over} {last}."


def to_svg(figure: Any, description: str) -> str:
    """The figure as one element that needs nothing from outside; its text is text, its ink the page's."""
    import matplotlib

    stream = io.StringIO()
    # the salt keeps a plot the same from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL
    )  # would restyle the whole page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")  # HTML needs no namespaces
    text = _with_own_ids(text, hashlib.sha256(description.encode()).hexdigest()[:8])
    width, height = figure.get_size_inches() * 72
    opening = f'<svg role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width:g} {height:g}">'
    return opening + text[text.index(">") + 1 :]


def _with_own_ids(svg: str, name: str) -> str:
    """Ids that something refers to, made unique on the page by ``name``; all others ("axes_1", in every plot) go."""
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {first or second for first, second in used}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in names else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
