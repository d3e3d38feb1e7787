"""What became of the utterances that a teacher transcribed: figures for JSON, and as lines to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s3distill.data.label_text import LabelText
from s3distill.data.manifest_lines import Manifest
from s3distill.data.pseudo_label_files import Selection
from s3distill.data.pseudo_label_journal import Decoded
from s3distill.decoding.scoring import error_rates
from s3distill.encoder.config import SAMPLE_RATE


def report(
    manifest: Manifest, decoded: Decoded, selection: Selection, text: LabelText, reference: Sequence[str] | None
) -> dict[str, Any]:
    """What was removed and what stayed, for JSON: utterances and hours, and, where words are known, the labels' error rate."""
    lengths = [num_samples / SAMPLE_RATE / 3600 for _, num_samples in manifest.entries]
    kept = selection.indices
    best = [entry.hypotheses[0] for entry in selection.entries]
    values: dict[str, Any] = {
        "utterances": {"all": len(lengths), "kept": len(kept)},
        "hours": {"all": sum(lengths), "kept": sum(lengths[index] for index in kept)},
        "removed": {
            name: {"utterances": len(indices), "hours": sum(lengths[index] for index in indices)}
            for name, indices in selection.removed.items()
        },
        "hypotheses": {
            "kept": sum(len(entry.hypotheses) for entry in selection.entries),
            "dropped": selection.num_dropped,
        },
        "mean_confidence": sum(hypothesis.confidence for hypothesis in best) / len(best) if best else None,
    }
    if reference is not None:
        written = [_best_words(decoded[index], text) for index in range(len(lengths))]
        values["label_wer"] = {
            "all": error_rates(reference, written).wer,
            "kept": error_rates([reference[i] for i in kept], [written[i] for i in kept]).wer if kept else None,
        }
    return values


def _best_words(utterance: dict[str, Any], text: LabelText) -> str:
    hypotheses = utterance["hypotheses"]
    return text.words(hypotheses[0]["units"].split()) if hypotheses else ""


def table(values: dict[str, Any]) -> list[str]:
    """The report as lines to read."""
    rows = [("", "utterances", "hours"), _row("decoded", values, "all")]
    rows += [(f"- {name}", str(r["utterances"]), f"{r['hours']:.3f}") for name, r in values["removed"].items()]
    rows.append(_row("kept", values, "kept"))
    lines = [f"{name:24}{count:>12}{hours:>12}" for name, count, hours in rows]
    hypotheses = values["hypotheses"]
    lines.append(f"hypotheses: {hypotheses['kept']} kept, {hypotheses['dropped']} behind the best were removed")
    if values["mean_confidence"] is not None:
        lines.append(f"mean confidence of the labels: {values['mean_confidence']:.4f}")
    if "label_wer" in values:
        kept = values["label_wer"]["kept"]
        lines.append(
            f"WER of the labels against the reference: {values['label_wer']['all']:.2f}% before the filters"
            + ("" if kept is None else f", {kept:.2f}% behind them")
        )
    return lines


def _row(name: str, values: dict[str, Any], which: str) -> tuple[str, str, str]:
    return name, str(values["utterances"][which]), f"{values['hours'][which]:.3f}"
