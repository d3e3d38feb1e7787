"""The table of `run.sh`: error rates on the old and the new task, before and after each way of learning."""

import json
import sys
from pathlib import Path


def scores(folder: Path, split: str) -> dict[str, float]:
    return json.loads((folder / f"scores-{split}.json").read_text())


def row(name: str, old: dict[str, float], new: dict[str, float]) -> str:
    return f"| {name} | {old['wer']:.2f} | {old['uer']:.2f} | {new['wer']:.2f} | {new['uer']:.2f} |"


def label(name: str) -> str:
    """What a run is called in the table: ``ewc_10`` -> EWC, lambda 10."""
    kind, _, value = name.partition("_")
    return {
        "plain": "plain fine-tuning",
        "ewc": f"EWC, lambda {value}",
        "tac": f"task alignment, gamma {value}",
        "replay": f"replay, {value} of A",
        "mask": "a mask for B (A keeps its model)",
    }[kind]


def table(out: Path, split: str, names: list[str]) -> list[str]:
    """Markdown lines."""
    decoded = out / "decode"
    before = scores(decoded / "before" / "a", split)
    lines = ["| after learning B by | WER % A | UER % A | WER % B | UER % B |", "|---|---|---|---|---|"]
    lines.append(row("nothing yet (the model of A)", before, scores(decoded / "before" / "b", split)))
    for name in names:
        new = scores(decoded / name / "b", split)
        old = before if name == "mask" else scores(decoded / name / "a", split)
        lines.append(row(label(name), old, new))
        if (decoded / name / "old_head").is_dir():
            lines.append(row(f"{label(name)}, A by its old head", scores(decoded / name / "old_head", split), new))
    new = scores(decoded / "before" / "b", split)
    return [*lines, "", f"Test words: {before['word']['num_reference']} of A, {new['word']['num_reference']} of B."]


def main() -> None:
    out, split, *names = Path(sys.argv[1]), *sys.argv[2:]
    lines = table(out, split, names)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
