"""Copies splits into another folder: manifest with an absolute root, so that it finds its audio from there, and label files.

usage: python examples/pseudo_labels/copy_split.py DATA OUT valid test
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from s3distill.data.manifest import read_labels, read_manifest, write_lines, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies splits into another folder.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("splits", nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.splits:
        copy_split(args.data / name, args.out / name)


def copy_split(source: Path, target: Path, indices: Sequence[int] | None = None) -> None:
    """Writes ``target``.tsv, .ltr and .wrd from those of ``source``; all utterances, or those of ``indices``."""
    manifest = read_manifest(f"{source}.tsv")
    indices = range(len(manifest.entries)) if indices is None else indices
    for ending in ("ltr", "wrd"):
        if Path(f"{source}.{ending}").exists():
            lines = read_labels(f"{source}.{ending}")
            write_lines(f"{target}.{ending}", [lines[i] for i in indices])
    write_manifest(f"{target}.tsv", manifest.root, [manifest.entries[i] for i in indices])
    print(f"{target}.tsv: {len(indices)} utterances")


if __name__ == "__main__":
    main()
