"""`s3distill manifest DIR --out DIR`: write wav2vec manifests, and labels where transcripts lie beside the audio."""

from __future__ import annotations

import argparse

from s3distill.data.manifest_build import BuildOptions, build_manifests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = BuildOptions()
    parser.add_argument("audio_dir", metavar="DIR", help="folder of audio; its subfolders are searched too")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the manifests")
    parser.add_argument(
        "--split", "--split-name", metavar="NAME", help="write all into NAME.tsv (default: train and valid)"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=defaults.valid_fraction, help="part drawn for valid.tsv (%(default)s)"
    )
    parser.add_argument(
        "--test-fraction", type=float, default=defaults.test_fraction, help="part drawn for test.tsv (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="decides what is drawn (%(default)s)")
    parser.add_argument(
        "--ext", default=",".join(defaults.endings), metavar="ENDINGS", help="endings of audio files (%(default)s)"
    )
    parser.add_argument("--min-seconds", type=float, default=defaults.min_seconds, help="leave out shorter files")
    parser.add_argument("--max-seconds", type=float, default=defaults.max_seconds, help="leave out longer files")
    parser.add_argument("--no-labels", action="store_true", help="look for no transcripts")
    parser.add_argument(
        "--skip-untranscribed", action="store_true", help="leave out files without a usable transcript (default: stop)"
    )
    parser.add_argument("--workers", type=int, default=defaults.max_workers, help="threads (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    options = BuildOptions(
        endings=tuple(args.ext.split(",")),
        split=args.split,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
        min_seconds=args.min_seconds,
        max_seconds=args.max_seconds,
        labels=not args.no_labels,
        skip_untranscribed=args.skip_untranscribed,
        max_workers=args.workers,
    )
    statistics = build_manifests(args.audio_dir, args.out, options, progress=not args.no_progress)
    for split, row in statistics.items():
        labels = "with .wrd and .ltr" if row["labels"] else "no transcripts found, no labels"
        if args.no_labels:
            labels = "no labels"
        print(f"{args.out}/{split}.tsv: {row['utterances']} utterances, {row['hours']:.2f} hours, {labels}")
    return 0
