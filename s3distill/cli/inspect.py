"""`s3distill inspect CKPT`: parameters, MACs, shapes and speed of a checkpoint."""

from __future__ import annotations

import argparse
import json
from typing import Any

import s3distill
from s3distill.analysis.measure import describe, measure_mask_speedup, measure_rtf, measure_speedup

REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of s3distill or fairseq")
    parser.add_argument(
        "--compare", metavar="OTHER", help="another checkpoint, such as the teacher's, to hold it against"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-rtf", action="store_true", help="do not measure speed")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the audio that is timed (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (torch's own choice)")


def run(args: argparse.Namespace) -> int:
    report = describe(args.checkpoint)
    if args.compare:
        report["other"] = describe(args.compare)
    if not args.no_rtf:
        _measure(report, args)
    print(json.dumps(report, indent=2) if args.json else "\n".join(table(report)))
    return 0


def _measure(report: dict[str, Any], args: argparse.Namespace) -> None:
    if report["masks"] is not None and report["masks"]["macs_saved"] > 0:
        gain = measure_mask_speedup(args.checkpoint, args.seconds, REPEATS, args.threads)
        report["masks"]["measured_speedup"] = None if gain is None else gain.speedup
    model = s3distill.load(args.checkpoint)
    if not args.compare:
        report["rtf"], report["num_threads"] = _speed(measure_rtf(model, args.seconds, REPEATS, args.threads))
        return
    pair = measure_speedup(s3distill.load(args.compare), model, args.seconds, REPEATS, args.threads)
    report["rtf"], report["num_threads"] = _speed(pair.student)
    report["other"]["rtf"], report["other"]["num_threads"] = _speed(pair.teacher)
    report["speedup"] = pair.speedup


def _speed(measured: Any) -> tuple[float, int]:
    return measured.rtf, measured.num_threads


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines to read, the other checkpoint's figures beside."""
    columns = [report, report["other"]] if "other" in report else [report]
    lines = [
        f"{c['path']}: {c['model'] or 'unnamed model'} ({c['family']}), {c['checkpoint_bytes'] / 1e6:.2f} MB"
        for c in columns
    ]
    lines += ["", _row("", ["", "OTHER", "kept"][: 1 + 2 * (len(columns) - 1)])]
    named = {
        "encoder": "encoder",
        "ctc_head": "output head",
        "prediction_heads": "prediction heads",
        "gates": "gates",
        "other": "other",
    }
    for part, label in named.items():
        if any(c["params"][part] for c in columns):
            lines.append(_figures(f"parameters, {label}", [c["params"][part] for c in columns]))
    lines.append(_figures("parameters, all", [c["params"]["total"] for c in columns]))
    lines.append(_figures("MACs per second of audio", [c["macs_per_second"] for c in columns]))
    for part in report["breakdown"]["macs_per_second"]:
        macs = [c["breakdown"]["macs_per_second"][part] for c in columns]
        if part != "time_reduction" or any(macs):  # which most models have none of
            lines.append(_figures(f"  {part}", macs))
    if "rtf" in report:
        speeds = [f"{c['rtf']:.4f}" for c in columns] + ([f"{report['speedup']:.2f}x"] if "speedup" in report else [])
        lines.append(_row(f"real-time factor, CPU, {report['num_threads']} threads", speeds))
    return [*lines, *_masks(report["masks"]), "", *_shapes(report)]


def _masks(masks: dict[str, Any] | None) -> list[str]:
    if masks is None:
        return []
    lines = [
        f"masks: {masks['number']} ({masks['pattern']}) keep {masks['density']:.2%} of {_si(masks['connections'])} connections",
        f"  storage: {masks['mask_bytes'] / 1e6:.2f} MB as bits, where the weights take {masks['weight_bytes'] / 1e6:.2f} MB",
        f"  speed:   {masks['speed']}",
    ]
    if masks["macs_saved"] > 0:
        measured = masks.get("measured_speedup")
        shown = f"; the encoder runs {measured:.2f}x as fast on this CPU" if measured else ""
        lines.append(f"           {masks['macs_saved']:.1%} of the masked Linears' MACs{shown}")
    return ["", *lines]


def _shapes(report: dict[str, Any]) -> list[str]:
    lines = [
        f"shapes (width {report['embed_dim']}, {'pre' if report['layer_norm_first'] else 'post'}-LN, {report['extractor_mode']}):"
    ]
    for i, conv in enumerate(report["conv_layers"]):
        lines.append(
            f"  conv {i:2}   {conv['channels']:5} channels   kernel {conv['kernel']:2}   stride {conv['stride']}"
            f"{'   separable' if conv['separable'] else ''}"
        )
    lines += [f"  {line}" for line in report["variants"]]
    for i, layer in enumerate(report["layers"]):
        attention = (
            f"{layer['num_heads']:3} heads of {layer['head_dim']:3}" if layer["attention"] else "no attention    "
        )
        reuse = "   reuses the attention map before it" if layer["reuses_attention"] else ""
        lines.append(
            f"  layer {i:2}  {attention}   {'FFN ' + str(layer['ffn_dim']) if layer['ffn'] else 'no FFN'}{reuse}"
        )
    return lines


def _figures(label: str, values: list[float]) -> str:
    shown = [_si(value) for value in values]
    if len(values) == 2:
        shown.append(f"{100 * values[0] / values[1]:.1f}%" if values[1] else "")
    return _row(label, shown)


def _row(label: str, cells: list[str]) -> str:
    return (f"{label:36}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def _si(value: float) -> str:
    """12345678 -> '12.35 M'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"
