"""Several runs beside each other: error rate or loss against size, MACs and real-time factor, as one HTML file and a CSV."""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from s3distill.analysis.comparison import Point
from s3distill.analysis.plots import INK, PALETTE, new_figure, to_svg
from s3distill.analysis.report import STYLE, captioned
from s3distill.data.manifest import write_lines

COSTS = {
    "params": ("parameters (millions)", 1e-6),
    "macs_per_second": ("MACs per second of audio (millions)", 1e-6),
    "rtf": ("real-time factor on this CPU", 1.0),
}
QUALITIES = {"wer": "word error rate (%)", "loss": "distillation loss per frame"}
_COLUMNS = {
    "params": ("params (M)", 1e-6, ".3f"),
    "macs_per_second": ("MACs/s (M)", 1e-6, ".1f"),
    "rtf": ("RTF", 1.0, ".4f"),
    "wer": ("WER %", 1.0, ".2f"),
    "uer": ("UER %", 1.0, ".2f"),
    "loss": ("loss", 1.0, ".4f"),
    "minutes": ("training min", 1.0, ".2f"),
}


def shown_columns(points: Sequence[Point]) -> list[str]:
    """The columns that at least one point has a figure for."""
    return [name for name in _COLUMNS if any(getattr(point, name) is not None for point in points)]


def table_rows(points: Sequence[Point]) -> list[list[str]]:
    """Header and one line per point, as text; a dash where a point has no figure."""
    columns = shown_columns(points)
    rows = [["model", *(_COLUMNS[name][0] for name in columns)]]
    for point in points:
        values = [(getattr(point, name), *_COLUMNS[name][1:]) for name in columns]
        rows.append([point.name, *("-" if v is None else f"{v * scale:{form}}" for v, scale, form in values)])
    return rows


def markdown_table(points: Sequence[Point]) -> list[str]:
    header, *rows = table_rows(points)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def write_comparison(
    path: str | os.PathLike[str],
    points: Sequence[Point],
    teacher: Point | None = None,
    title: str = "s3distill: runs compared",
) -> list[Path]:
    """Writes ``path`` (HTML) and the same figures beside it as ``.csv``, each whole or not at all.

    Args:
        points: the runs, without the teacher.
        teacher: drawn as dashed lines, at its cost and, where it has one, its error rate.
    Returns:
        The files.
    Raises:
        ValueError: no points, or none with an error rate or a loss.
        RuntimeError: matplotlib is not installed.
    """
    path = Path(path)
    everyone = [*([teacher] if teacher else []), *points]
    qualities = [name for name in QUALITIES if any(getattr(point, name) is not None for point in points)]
    if "wer" in qualities and any(point.series is None for point in points):
        qualities = [name for name in qualities if name != "loss"]  # of different students, it is not one quantity
    if not qualities:
        raise ValueError(
            "none of the runs has a word error rate (scores-SUBSET.json of fairseq-generate with --scoring s3_wer) or a validated "
            "distillation loss (hydra_train.log): there is nothing to draw against the costs; decode, or validate while training"
        )
    header, *rows = table_rows(everyone)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>",
    ]
    for quality in qualities:
        text = f"{QUALITIES[quality].capitalize()} against what a model costs."
        if teacher is not None:
            text += f" Dashed: the teacher, {teacher.name}."
        parts.append(captioned(plot_points(points, quality, teacher), text))
    meta = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{meta}<style>{STYLE}</style></head><body>'
    write_lines(path, ["\n".join([page, *parts, "</body></html>"])])
    table = path.with_suffix(".csv")
    write_lines(table, _csv_lines(everyone))
    return [path, table]


def plot_points(points: Sequence[Point], quality: str, teacher: Point | None = None) -> str:
    """One panel per cost that was measured: points over a logarithmic cost, a line through each series, the teacher dashed.

    Args:
        quality: ``wer`` or ``loss``.
    Returns:
        An ``<svg>`` element.
    """
    costs = [c for c in COSTS if any(getattr(p, c) is not None for p in points)]
    figure, panels = new_figure((9.6, 3.4), len(costs))
    for axes, cost in zip(panels if len(costs) > 1 else [panels], costs, strict=True):
        _draw_panel(axes, points, cost, quality, teacher)
    words = ", ".join(f"{p.name} {getattr(p, quality):.4g}" for p in points if getattr(p, quality) is not None)
    return to_svg(figure, f"{QUALITIES[quality]} by cost. {words}")


def _draw_panel(axes: Any, points: Sequence[Point], cost: str, quality: str, teacher: Point | None) -> None:
    label, scale = COSTS[cost]
    series = list(dict.fromkeys(point.series for point in points))
    for index, name in enumerate(series):
        drawn = [p for p in points if p.series == name and None not in (getattr(p, cost), getattr(p, quality))]
        drawn.sort(key=lambda point: float(getattr(point, cost)))
        xs = [getattr(p, cost) * scale for p in drawn]
        ys = [getattr(p, quality) for p in drawn]
        line = "-" if name is not None else ""
        axes.plot(xs, ys, line, marker="o", markersize=4, color=PALETTE[index % len(PALETTE)], linewidth=1.2)
        for x, y, point in zip(xs, ys, drawn, strict=True):
            axes.annotate(point.name, (x, y), (3, 3), textcoords="offset points", fontsize=6, color=INK)
    if teacher is not None:
        for draw, value in ((axes.axvline, getattr(teacher, cost)), (axes.axhline, getattr(teacher, quality))):
            if value is not None:
                factor = scale if draw == axes.axvline else 1.0
                draw(value * factor, color=INK, linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(QUALITIES[quality])


def _csv_lines(points: Sequence[Point]) -> list[str]:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return stream.getvalue().splitlines()
