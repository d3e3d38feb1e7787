"""The multilingual demo corpus: a folder per language, each a corpus of `demo`, and `all/`, which pools them.

A model that serves many languages is pre-trained and distilled on `all/`; each language's head, and its mask, is
trained on the language's own folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from s3distill.data.demo import SPLITS, DemoSettings, fresh_folder, require_replaceable, reusable, write_corpus
from s3distill.data.demo_languages import check_languages
from s3distill.data.demo_readme import multilingual_readme
from s3distill.data.manifest import read_labels, read_manifest, write_dictionary, write_lines, write_manifest
from s3distill.data.transcripts import count_symbols

logger = logging.getLogger(__name__)

POOLED = "all"
FORMAT_VERSION = 1  # of what is pooled; each language's corpus has its own

Statistics = dict[str, dict[str, dict[str, float]]]


def make_multilingual_corpus(
    out_dir: str | os.PathLike[str],
    languages: Sequence[str],
    train_minutes: float = 20.0,
    valid_minutes: float = 1.5,
    test_minutes: float = 4.0,
    seed: int = 1,
    progress: bool = True,
) -> Statistics:
    """Writes a multilingual demo corpus, or leaves it as it is where the same settings made it before.

    It is written to a temporary folder beside ``out_dir`` and renamed when it is whole. A language that is in
    ``out_dir`` already, with the same settings, is copied and not spoken again: adding a language costs that language.

    Args:
        out_dir: the folder; an older demo corpus there is replaced, anything else is left alone.
        languages: keys of `demo_languages.LANGUAGES`, in any order.
        train_minutes, valid_minutes, test_minutes: least length of each split, per language.
        seed: as in `demo.make_demo_corpus`, whose corpus of a language is what is in that language's folder.
        progress: show a progress bar per language.
    Returns:
        Per folder (the languages, then ``all``) and split: ``utterances``, ``minutes``, ``words``, ``voices``.
    Raises:
        ValueError: a setting out of range, an unknown language, or ``out_dir`` holds something else.
        RuntimeError: the espeak-ng library is missing.
    """
    lengths = (train_minutes, valid_minutes, test_minutes)
    settings = {name: DemoSettings(*lengths, seed, name) for name in check_languages(languages)}
    out_dir = Path(out_dir)
    require_replaceable(out_dir)
    statistics = _reusable(out_dir, settings)
    if statistics is not None:
        logger.info("%s: reused, it was made with the same settings", out_dir)
        return statistics
    statistics = {}
    with fresh_folder(out_dir) as work_dir:
        for language, own in settings.items():
            old = reusable(out_dir / language, own)
            if old is not None:
                shutil.copytree(out_dir / language, work_dir / language)
            else:
                (work_dir / language).mkdir()
            statistics[language] = old or write_corpus(work_dir / language, own, progress)
        _write_pooled(work_dir, tuple(settings))
        statistics[POOLED] = _sums(statistics)
        write_lines(work_dir / "README.txt", multilingual_readme(tuple(settings), statistics).splitlines())
        record = {"settings": _description(settings), "statistics": statistics}
        write_lines(work_dir / "demo.json", [json.dumps(record, indent=2)])
    logger.info(
        "%s: %s", out_dir, ", ".join(f"{name} {rows['train']['minutes']:g} min" for name, rows in statistics.items())
    )
    return statistics


def _description(settings: dict[str, DemoSettings]) -> dict[str, object]:
    first = next(iter(settings.values()))
    return {
        "format": FORMAT_VERSION,
        "synthetic": True,
        "languages": list(settings),
        **{name: getattr(first, name) for name in ("train_minutes", "valid_minutes", "test_minutes", "seed")},
    }


def _reusable(out_dir: Path, settings: dict[str, DemoSettings]) -> Statistics | None:
    """The statistics of the corpus in ``out_dir`` if it was made with these settings and all its files are there."""
    try:
        record = json.loads((out_dir / "demo.json").read_text(encoding="utf-8"))
        pooled = [f"{POOLED}/{split}.{ending}" for split in SPLITS for ending in ("tsv", "ltr", "wrd")]
        is_whole = (
            record["settings"] == _description(settings)
            and all((out_dir / name).is_file() for name in [*pooled, f"{POOLED}/dict.ltr.txt", "README.txt"])
            and all(reusable(out_dir / language, own) is not None for language, own in settings.items())
        )
        return record["statistics"] if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not whole: make it again


def _write_pooled(work_dir: Path, languages: Sequence[str]) -> None:
    """Writes ``all/``: the utterances of all languages, one language behind the other, and the union of their letters."""
    pooled = work_dir / POOLED
    pooled.mkdir()
    for split in SPLITS:
        entries = [
            (f"{language}/{path}", num_samples)
            for language in languages
            for path, num_samples in read_manifest(work_dir / language / f"{split}.tsv").entries
        ]
        write_manifest(pooled / f"{split}.tsv", "..", entries)
        for ending in ("wrd", "ltr"):
            lines = [line for name in languages for line in read_labels(work_dir / name / f"{split}.{ending}")]
            write_lines(pooled / f"{split}.{ending}", lines)
            if (split, ending) == ("train", "ltr"):
                write_dictionary(pooled / "dict.ltr.txt", count_symbols(lines))


def _sums(statistics: Statistics) -> dict[str, dict[str, float]]:
    """The statistics of all languages together."""
    languages = list(statistics.values())
    names = languages[0]["train"]
    return {split: {name: round(sum(rows[split][name] for rows in languages), 3) for name in names} for split in SPLITS}
