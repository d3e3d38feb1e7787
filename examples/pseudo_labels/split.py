"""Splits a labelled manifest in two: some utterances keep their labels for a teacher, the rest is the pool to be pseudo-labelled.

usage: python examples/pseudo_labels/split.py DATA OUT --labelled 150 [--seed 1]

Writes OUT/labelled.tsv and OUT/pool.tsv with .ltr and .wrd (the pool's only to measure how good pseudo-labels are), and copies the
dictionary and the other splits.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

from copy_split import copy_split

from s3distill.data.manifest import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Splits a labelled manifest into labelled and pool.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labelled", type=int, required=True, metavar="N", help="utterances that keep their labels")
    parser.add_argument("--train", default="train", help="split to divide (%(default)s)")
    parser.add_argument("--keep", nargs="*", default=["valid", "test"], help="splits to copy (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    manifest = read_manifest(args.data / f"{args.train}.tsv")
    number = len(manifest.entries)
    if not 0 < args.labelled < number:
        parser.error(f"--labelled must leave something to label, so be from 1 to {number - 1}, but is {args.labelled}")
    labelled = set(random.Random(args.seed).sample(range(number), args.labelled))
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.data / "dict.ltr.txt", args.out / "dict.ltr.txt")
    parts = {"labelled": sorted(labelled), "pool": sorted(set(range(number)) - labelled)}
    for name, indices in parts.items():
        copy_split(args.data / args.train, args.out / name, indices)
    for name in args.keep:
        copy_split(args.data / name, args.out / name)


if __name__ == "__main__":
    main()
