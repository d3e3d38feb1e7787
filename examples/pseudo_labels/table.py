"""The tables of `run.sh`: how good the pseudo-labels are, and what students make of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "teacher": "teacher: labelled utterances only",
    "labelled": "student: labelled utterances only",
    "gold": "student: true labels of all",
    "one_best": "1-best",
    "uniform": "K-best, uniform",
    "ranked": "K-best, ranked",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the tables of run.sh as Markdown.")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+")
    args = parser.parse_args()
    print("| pseudo-labels | utterances | hours | WER of the labels % |\n|---|---|---|---|")
    for name in ("raw", "filtered"):
        print(label_row(name, json.loads((args.out / "labels" / name / "train.report.json").read_text())))
    print("\n| model | WER % | UER % | words wrong |\n|---|---|---|---|")
    for run in args.runs:
        scores = json.loads((args.out / run / "decode" / "scores-test.json").read_text())
        word = scores["word"]
        print(
            f"| {title(run)} | {scores['wer']:.2f} | {scores['uer']:.2f} | {word['errors']} of {word['num_reference']} |"
        )


def label_row(name: str, report: dict[str, Any]) -> str:
    removed = ", ".join(f"{key} {r['utterances']}" for key, r in report["removed"].items() if r["utterances"])
    kept, hours = report["utterances"]["kept"], report["hours"]["kept"]
    return f"| {name}{f' (removed: {removed})' if removed else ''} | {kept} | {hours:.3f} | {report['label_wer']['kept']:.2f} |"


def title(run: str) -> str:
    labels, _, weighting = run.partition("_")
    return f"student: {labels} {NAMES[weighting]}" if weighting else NAMES[run]


if __name__ == "__main__":
    main()
