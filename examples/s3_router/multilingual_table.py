"""The table of `multilingual.sh`: error rates of masks and of full fine-tuning per language, and the bytes of both."""

import json
import sys
from pathlib import Path


def scores(folder: Path, split: str) -> dict[str, float]:
    return json.loads((folder / f"scores-{split}.json").read_text())


def table(out: Path, split: str, languages: list[str]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| language | WER % mask | WER % full | UER % mask | UER % full | words |",
        "|---|---|---|---|---|---|",
    ]
    for language in languages:
        mask, full = (scores(out / "decode" / f"{kind}_{language}", split) for kind in ("mask", "full"))
        lines.append(
            f"| {language} | {mask['wer']:.2f} | {full['wer']:.2f} | {mask['uer']:.2f} | {full['uer']:.2f} | "
            f"{mask['word']['num_reference']} |"
        )
    size = json.loads((out / "bank.json").read_text())
    lines += [
        "",
        f"One backbone and a bank of {len(size['masks'])} masks with their heads: {size['total_bytes'] / 1e6:.1f} MB; "
        f"{len(size['masks'])} separate models: {size['separate_bytes'] / 1e6:.1f} MB ({size['saved']:.1%} fewer bytes, float32).",
    ]
    return lines


def main() -> None:
    out, split, *languages = Path(sys.argv[1]), *sys.argv[2:]
    lines = table(out, split, languages)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
