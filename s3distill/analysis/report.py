"""The report of a compression run: one HTML file that opens offline."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3distill.analysis.curves import Curve, TrainingCurves, read_curves
from s3distill.analysis.plots import KeptUnits, plot_curves, plot_kept_units
from s3distill.data.manifest import write_lines

SYNTHETIC = (
    "The speech of this run is synthetic: a synthesiser spoke sentences of a small grammar. Error rates on it show that the chain "
    "works, and say nothing about real speech."
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #fff; --line: #d5dae0; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14181c; --line: #39424b; --soft: #1e242a; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom-width: 2px; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; min-width: 30rem; }
figcaption { font-size: .9rem; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; }
.note { border-left: 4px solid var(--line); padding-left: .8rem; }
"""


@dataclass(frozen=True)
class _Row:
    """A row of the results: key, label, number format, unit scale, and how the student is held against the teacher."""

    key: str
    label: str
    form: str
    scale: float
    gain: str


_ROWS = (
    _Row("params", "parameters (millions)", ".3f", 1e-6, "less"),
    _Row("macs_per_second", "MACs per second of audio (millions)", ".1f", 1e-6, "less"),
    _Row("rtf", "real-time factor of the encoder", ".4f", 1.0, "less"),
    _Row("checkpoint_bytes", "checkpoint (MB)", ".2f", 1e-6, "less"),
    _Row("wer", "word error rate (%)", ".2f", 1.0, "points"),
)


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    runs: Mapping[str, str | os.PathLike[str]],
    kept_units: Mapping[str, KeptUnits],
    commands: Sequence[str] = (),
    title: str = "s3distill: teacher and student",
    data_statement: str = SYNTHETIC,
) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: the HTML file.
        results: ``teacher`` and ``student``, each with ``params, macs_per_second, rtf, wer`` (percent) and
            ``checkpoint_bytes``; and ``speedup``. What is missing is shown as a dash.
        runs: name of a stage -> its training log (see `read_curves`), in the order of the run.
        kept_units: ``conv``, ``head``, ``ffn`` -> per layer (kept, total).
        commands: what was run, to be copied.
        data_statement: what the figures were taken on, said plainly.
    Raises:
        ValueError, FileNotFoundError: results without teacher or student, or a log that cannot be read.
        RuntimeError: matplotlib is not installed.
    """
    for name in ("teacher", "student"):
        if not isinstance(results.get(name), Mapping):
            raise ValueError(f"`results` must hold the figures of 'teacher' and 'student', but has {sorted(results)}")
    curves = {name: read_curves(log) for name, log in runs.items()}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">{html.escape(data_statement)}</p>',
        "<h2>Results</h2>",
        _table(results),
        *_kept_section(kept_units),
        *_size_section(curves),
        *_loss_section(curves),
        *_command_section(commands),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    write_lines(Path(path), [f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>'])


def _table(results: Mapping[str, Any]) -> str:
    teacher, student = results["teacher"], results["student"]
    rows = []
    for row in _ROWS:
        cells = [_number(figures.get(row.key), row) for figures in (teacher, student)]
        rows.append(
            f"<tr><td>{row.label}</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{_gain(teacher, student, row)}</td></tr>"
        )
    if results.get("speedup") is not None:
        rows.append(
            f"<tr><td>speed-up of the encoder, measured</td><td>1.00x</td><td>{results['speedup']:.2f}x</td><td></td></tr>"
        )
    titles = ("", "teacher", "student", "difference")
    head = "".join(f'<th scope="col">{text}</th>' for text in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: Any, row: _Row) -> str:
    return "-" if value is None else f"{value * row.scale:{row.form}}"


def _gain(teacher: Mapping[str, Any], student: Mapping[str, Any], row: _Row) -> str:
    before, after = teacher.get(row.key), student.get(row.key)
    if before is None or after is None:
        return ""
    if row.gain == "points":
        return f"{after - before:+.2f} points"
    return f"{100 * (after / before - 1):+.1f}%" if before else ""


def _kept_section(kept: Mapping[str, KeptUnits]) -> list[str]:
    shown = {unit: list(layers) for unit, layers in kept.items() if layers}
    if not shown:
        return []
    text = "Pale: the teacher's units, full: what the student kept."
    return ["<h2>Kept units per layer</h2>", captioned(plot_kept_units(shown), text)]


def _size_section(curves: Mapping[str, TrainingCurves]) -> list[str]:
    parts = []
    for name, run in curves.items():
        sparsity = _pick(run.train, {"expected": "expected_sparsity", "target": "target_sparsity"})
        if not sparsity:
            continue
        multipliers = _pick(run.train, {"lambda 1": "lambda1", "lambda 2": "lambda2"})
        text = "Expected sparsity (fraction removed) and its target, solid; the multipliers of the size constraint, dashed."
        parts.append(captioned(plot_curves(f"{name}: sparsity", sparsity, multipliers), text))
    return ["<h2>Sparsity</h2>", *parts] if parts else []


def _loss_section(curves: Mapping[str, TrainingCurves]) -> list[str]:
    parts = []
    for name, run in curves.items():
        losses = _pick(run.train, {"training": "loss"}) | _pick(run.valid, {"validation": "loss"})
        if losses:
            parts.append(captioned(plot_curves(f"{name}: loss", losses), f"Loss of stage {name}."))
        wer = _pick(run.valid, {"WER, % (validation)": "wer"})
        if wer:
            parts.append(
                captioned(
                    plot_curves(f"{name}: word error rate", wer), f"Word error rate at each validation of stage {name}."
                )
            )
    return ["<h2>Training</h2>", *parts] if parts else []


def _command_section(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    return [
        "<h2>Commands</h2>",
        "<p>What was run, in this order:</p>",
        f"<pre>{html.escape(chr(10).join(commands))}</pre>",
    ]


def _pick(found: Mapping[str, Curve], names: Mapping[str, str]) -> dict[str, Curve]:
    return {label: found[name] for label, name in names.items() if name in found}


def captioned(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
