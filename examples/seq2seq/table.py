"""The table of `run.sh`: error rates of the teacher and of each student, over seeds where there are several."""

import json
import statistics
import sys
from pathlib import Path

TITLES = {
    "random": "labels, decoder from random weights",
    "labels": "labels, decoder from the teacher's layers",
    "word": "+ word-level distillation",
    "one_best": "+ sequence-level, 1-best",
    "k_best": "+ sequence-level, K-best (ranked)",
}


def scores(run: Path, split: str) -> dict[str, float]:
    return json.loads((run / "decode" / f"scores-{split}.json").read_text())


def row(title: str, runs: list[Path], split: str) -> str:
    """A line of Markdown: mean over the runs, and the lowest and highest where there are several."""
    found = [scores(run, split) for run in runs]
    cells = []
    for rate in ("wer", "uer"):
        values = [score[rate] for score in found]
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.2f}{spread}")
    return f"| {title} | {' | '.join(cells)} | {len(runs)} |"


def table(out: Path, split: str) -> list[str]:
    """Markdown lines; students that were not trained are left out."""
    lines = ["| model | WER % | UER % | runs |", "|---|---|---|---|", row("teacher", [out / "teacher"], split)]
    for kind, title in TITLES.items():
        runs = [path.parents[1] for path in sorted(out.glob(f"{kind}/seed*/decode/scores-{split}.json"))]
        if runs:
            lines.append(row(title, runs, split))
    return lines


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]), sys.argv[2])))
