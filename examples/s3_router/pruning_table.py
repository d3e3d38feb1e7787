"""The table and the plot of `pruning.sh`: word error rates of the pruned models, by method and sparsity."""

import argparse
import html
import json
from pathlib import Path
from typing import Any

from s3distill.analysis.curves import Curve
from s3distill.analysis.measure import describe
from s3distill.analysis.plots import plot_curves

NAMES = {"s3_router": "S3-Router", "omp": "OMP", "imp": "IMP", "parp": "PARP"}


def scores(out: Path, run: str, split: str) -> dict[str, Any]:
    return json.loads((out / "decode" / run / f"scores-{split}.json").read_text())


def collect(out: Path, split: str, methods: list[str], sparsities: list[int]) -> dict[str, Any]:
    """Everything that was measured: WER and UER in percent, and the sparsity that the checkpoints really have."""
    runs = {name: scores(out, name, split) for name in ("dense", "dense_longer")}
    pruned = {}
    for method in methods:
        for sparsity in sparsities:
            run = f"{method}_{sparsity}"
            facts = describe(out / run / "checkpoints" / "checkpoint_last.pt")["masks"]
            pruned[run] = {
                "method": method,
                "sparsity": 100 * (1 - facts["density"]),
                **rates(scores(out, run, split)),
            }
    return {
        "split": split,
        "words": runs["dense"]["word"]["num_reference"],
        **{name: rates(value) for name, value in runs.items()},
        "pruned": pruned,
    }


def rates(score: dict[str, Any]) -> dict[str, float]:
    return {"wer": score["wer"], "uer": score["uer"]}


def table(results: dict[str, Any], methods: list[str], sparsities: list[int]) -> list[str]:
    """Markdown lines: a row per method, a column per sparsity."""
    lines = [
        "| WER % | dense | " + " | ".join(f"{sparsity}% removed" for sparsity in sparsities) + " |",
        "|---|---|" + "---|" * len(sparsities),
        f"| fine-tuned | {results['dense']['wer']:.2f} |" + " |" * len(sparsities),
        f"| fine-tuned longer | {results['dense_longer']['wer']:.2f} |" + " |" * len(sparsities),
    ]
    for method in methods:
        cells = [f"{results['pruned'][f'{method}_{sparsity}']['wer']:.2f}" for sparsity in sparsities]
        lines.append(f"| {NAMES[method]} | | " + " | ".join(cells) + " |")
    return [*lines, "", f"{results['words']} words in the split {results['split']}."]


def page(results: dict[str, Any], methods: list[str], sparsities: list[int], lines: list[str]) -> str:
    """One HTML file with the plot and the table."""
    curves = {
        NAMES[method]: Curve(sparsities, [results["pruned"][f"{method}_{s}"]["wer"] for s in sparsities])
        for method in methods
    }
    curves["dense"] = Curve(sparsities, [results["dense"]["wer"]] * len(sparsities))
    plot = plot_curves("Word error rate (%) of pruned models", curves, over="percent removed")
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Pruning</title>'
        "<style>:root { color-scheme: light dark } body { max-width: 50rem; margin: 2rem auto; font: 16px/1.5 sans-serif }</style>"
        f"<h1>S3-Router, OMP, IMP and PARP</h1><figure>{plot}</figure><pre>{html.escape(chr(10).join(lines))}</pre></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), required=True)
    parser.add_argument("--sparsities", nargs="+", type=int, required=True)
    args = parser.parse_args()
    results = collect(args.out, args.split, args.methods, args.sparsities)
    lines = table(results, args.methods, args.sparsities)
    (args.out / "pruning.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "pruning.md").write_text("\n".join(lines) + "\n")
    (args.out / "pruning.html").write_text(page(results, args.methods, args.sparsities, lines))
    print("\n".join(lines))
    print(f"\n{args.out / 'pruning.md'}, pruning.json and pruning.html")


if __name__ == "__main__":
    main()
