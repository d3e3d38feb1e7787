"""`s3distill masks inventory`: phoneme inventories of languages, and how alike they are, to hold masks against."""

from __future__ import annotations

import argparse
from pathlib import Path

from s3distill.data.phoneme_inventory import build_inventories, compare_inventories, write_inventories
from s3distill.data.similarity_csv import SimilarityMatrix, write_similarity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--languages",
        required=True,
        metavar="en,nl,...",
        help="names of the bank's entries that are languages of espeak-ng too; NAME=LANGUAGE where they differ (zh-CN=cmn)",
    )
    parser.add_argument(
        "--words",
        metavar="FOLDER",
        help="folder with NAME.txt, words or sentences of a language (those of a label file will do); where there is none, "
        "espeak-ng's own words are taken: names of emoji, which 64 languages have, and numbers",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="CSV",
        help="similarity matrix to write, for masks similarity --reference; the inventories go into a .json beside it",
    )


def run(args: argparse.Namespace) -> int:
    languages = _languages(args.languages)
    output = Path(args.output)
    if output.suffix == ".json":
        raise ValueError(
            f"`--output` must be a CSV file, but is {args.output}; the .json beside it holds the inventories"
        )
    inventories = build_inventories(languages, _words(args.words, languages))
    matrix = compare_inventories(inventories)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_inventories(output.with_suffix(".json"), inventories)
    write_similarity(output, matrix)
    for name, inventory in inventories.items():
        print(
            f"{name}: {len(inventory.sounds)} sounds in {inventory.num_words} words (table {inventory.table} has "
            f"{inventory.num_own + inventory.num_inherited}): {' '.join(inventory.sounds)}"
        )
    print("\n".join(["", *table(matrix), "", f"wrote {output} and {output.with_suffix('.json')}"]))
    return 0


def table(matrix: SimilarityMatrix) -> list[str]:
    """The matrix as lines to read."""
    width = max(map(len, matrix.names)) + 2
    lines = [" " * width + "".join(f"{name:>{max(width, 6)}}" for name in matrix.names)]
    for name, row in zip(matrix.names, matrix.values, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{value:>{max(width, 6)}.2f}" for value in row))
    return lines


def _languages(text: str) -> dict[str, str]:
    languages: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, language = part.partition("=")
        if name in languages:
            raise ValueError(f"`--languages` must name each language once, but has {name!r} twice; leave one out")
        languages[name] = language or name
    return languages


def _words(folder: str | None, languages: dict[str, str]) -> dict[str, list[str]]:
    """Lines of the files, in small letters: espeak-ng spells some words that stand in capitals, as those of labels do."""
    if folder is None:
        return {}
    paths = {name: Path(folder, f"{name}.txt") for name in languages}
    if not any(path.is_file() for path in paths.values()):
        raise ValueError(
            f"`--words` must be a folder with a file such as {next(iter(languages), 'nl')}.txt, but {folder} has none for "
            f"{', '.join(languages)}; name the files after the languages"
        )
    return {
        name: path.read_text(encoding="utf-8").lower().splitlines() for name, path in paths.items() if path.is_file()
    }
