"""`s3distill demo-data OUT`: synthesise the demo corpus."""

from __future__ import annotations

import argparse

from s3distill.data.demo import DemoSettings, make_demo_corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = DemoSettings()
    parser.add_argument("out", metavar="OUT", help="folder of the corpus; an older demo corpus there is replaced")
    parser.add_argument("--minutes", type=float, default=defaults.train_minutes, help="length of train (%(default)s)")
    parser.add_argument(
        "--valid-minutes", type=float, default=defaults.valid_minutes, help="length of valid (%(default)s)"
    )
    parser.add_argument(
        "--test-minutes", type=float, default=defaults.test_minutes, help="length of test (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="same seed, same bytes (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    statistics = make_demo_corpus(
        args.out, args.minutes, args.valid_minutes, args.test_minutes, args.seed, progress=not args.no_progress
    )
    print(f"{args.out}: synthetic speech (espeak-ng), not for judging a model on")
    for split, row in statistics.items():
        print(f"  {split:6}" + ", ".join(f"{value:g} {name}" for name, value in row.items()))
    return 0
