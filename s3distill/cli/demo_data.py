"""`s3distill demo-data OUT`: synthesise the demo corpus, in English or in several languages."""

from __future__ import annotations

import argparse

from s3distill.data.demo import DemoSettings, make_demo_corpus
from s3distill.data.demo_languages import LANGUAGES
from s3distill.data.demo_multilingual import make_multilingual_corpus


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
    parser.add_argument(
        "--languages",
        metavar="LIST",
        help=f"some of {','.join(LANGUAGES)}: a corpus of these lengths per language in OUT/LANGUAGE, and OUT/all with "
        "all of them (without it: an English corpus in OUT itself)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    settings = (args.minutes, args.valid_minutes, args.test_minutes, args.seed, not args.no_progress)
    if args.languages is None:
        folders = {"": make_demo_corpus(args.out, *settings)}
    else:
        languages = [name.strip() for name in args.languages.split(",")]
        folders = make_multilingual_corpus(args.out, languages, *settings)
    print(f"{args.out}: synthetic speech (espeak-ng), not for judging a model on")
    for folder, statistics in folders.items():
        for split, row in statistics.items():
            numbers = ", ".join(f"{value:g} {name}" for name, value in row.items())
            print(f"  {folder:4}{split:6}{numbers}" if folder else f"  {split:6}{numbers}")
    return 0
