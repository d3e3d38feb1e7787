"""`s3distill layer-weights CKPT...`: which of the teacher's layers models read that keep several prediction heads."""

from __future__ import annotations

import argparse
from pathlib import Path

from s3distill.analysis.layer_weights import read_layer_weights, write_layer_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="models made by keep-heads --layers all, best after fine-tuning"
    )
    parser.add_argument("-o", "--output", metavar="FILE.html", help="page with a plot and the figures")


def run(args: argparse.Namespace) -> int:
    weights = {_name(path): read_layer_weights(path) for path in args.checkpoints}
    if len(weights) < len(args.checkpoints):
        raise ValueError(f"every CKPT must be another file, but some come twice: {' '.join(args.checkpoints)}")
    for name, shares in weights.items():
        print(f"{name}: " + "  ".join(f"{layer} {share:.3f}" for layer, share in sorted(shares.items())))
    if args.output:
        write_layer_weights(args.output, weights)
        print(f"wrote {args.output}")
    return 0


def _name(path: str) -> str:
    return str(Path(path))
