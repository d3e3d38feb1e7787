"""`s3distill check MANIFEST.tsv`: list everything that is wrong with a manifest, its audio, labels and dictionary."""

from __future__ import annotations

import argparse

from s3distill import compat
from s3distill.data.manifest import check_manifest, label_path, read_manifest
from s3distill.data.manifest_check import num_frames
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import SAMPLE_RATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST.tsv")
    parser.add_argument(
        "--labels",
        metavar="ltr,wrd",
        help="label files: endings beside the manifest, or paths (default: .ltr and .wrd where they are there)",
    )
    parser.add_argument(
        "--dict",
        metavar="PATH",
        help="dictionary of the labels other than .wrd (default: dict.ENDING.txt beside them; "
        "classes of utterances, one word a line, need none)",
    )
    parser.add_argument(
        "--model",
        metavar="CKPT",
        help="student that is to be trained with CTC, whose frames the label lines must fit (default: 50 frames per second)",
    )
    parser.add_argument("--workers", type=int, default=4, help="threads that read audio (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    if args.labels is None:
        labels = [ending for ending in ("ltr", "wrd") if label_path(args.manifest, ending).exists()]
    else:
        labels = [label for label in args.labels.split(",") if label]
    frames_of = num_frames
    if args.model is not None:
        frames_of = parse_checkpoint(compat.load_checkpoint(args.model), args.model).config.num_frames
    faults = check_manifest(
        args.manifest, labels, args.dict, args.workers, progress=not args.no_progress, frames_of=frames_of
    )
    for fault in faults:
        print(fault)
    if faults:
        print(f"{args.manifest}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
        return 1
    manifest = read_manifest(args.manifest)
    hours = manifest.num_samples / SAMPLE_RATE / 3600
    checked = ", ".join(["audio", *labels])
    print(f"{args.manifest}: {len(manifest.entries)} utterances, {hours:.2f} hours, no faults ({checked} checked)")
    return 0
