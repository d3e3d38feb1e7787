"""Manifests for a folder of audio: walk it, check every file, split it, and write labels where transcripts are."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from s3distill.data.audio import AudioError, check_audio
from s3distill.data.manifest import read_dictionary, write_dictionary, write_lines, write_manifest
from s3distill.data.transcripts import count_symbols, find_transcripts, normalise, spell
from s3distill.encoder.config import SAMPLE_RATE

logger = logging.getLogger(__name__)

MAX_LISTED = 10  # files named in an error


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How a folder becomes manifests.

    Args:
        endings: file name endings of audio, without the dot.
        split: name of the one manifest to write, or None for train, valid and test.
        valid_fraction, test_fraction: parts of the utterances, drawn at random; at least one utterance if above 0.
        seed: decides the drawing.
        min_seconds, max_seconds: leave out shorter and longer files.
        labels: look for transcripts and write `.wrd`, `.ltr` and the dictionary.
        skip_untranscribed: leave out files without a usable transcript, instead of stopping there.
        max_workers: threads that read audio headers.
    """

    endings: tuple[str, ...] = ("flac", "wav")
    split: str | None = None
    valid_fraction: float = 0.01
    test_fraction: float = 0.0
    seed: int = 1
    min_seconds: float = 0.0
    max_seconds: float = float("inf")
    labels: bool = True
    skip_untranscribed: bool = False
    max_workers: int = 4

    def __post_init__(self) -> None:
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), but is {getattr(self, name)}; 0.01 holds out 1%")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"`valid_fraction` and `test_fraction` must leave something to train on, but are "
                f"{self.valid_fraction} and {self.test_fraction}; lower them"
            )
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"`min_seconds` must be at most `max_seconds`, but they are {self.min_seconds} and {self.max_seconds}"
            )
        if self.split is not None and (not self.split or set(self.split) & set("/\\\t\n")):
            raise ValueError(f"`split` must be a file name without folders, but is {self.split!r}; try 'dev-clean'")


def build_manifests(
    audio_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    options: BuildOptions | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Writes `SPLIT.tsv` (absolute root), and `SPLIT.wrd`, `SPLIT.ltr` and `dict.ltr.txt` where there are transcripts.

    All is read and checked before the first file is written. A `dict.ltr.txt` that is there already is kept, since a
    model may have been trained on its order, and has to hold every letter.

    Returns:
        Per split: ``utterances``, ``hours``, ``labels`` (1 if there are label files).
    Raises:
        ValueError: no audio, files of wrong rate or channels, unreadable ones (all are named), missing or unusable
            transcripts of some files, label files of an earlier run that would no longer match.
    """
    options = options or BuildOptions()
    root = Path(os.path.abspath(audio_dir))
    out_dir = Path(out_dir)
    samples = _read_lengths(root, options, progress)
    words = _read_words(list(samples), root, options)
    if words is not None:
        samples = {path: samples[path] for path in words}
    splits = _split(list(samples), options)
    if words is None:
        stale = [out_dir / f"{split}.{ending}" for split in splits for ending in ("ltr", "wrd")]
        stale = [path for path in stale if path.exists()]
        if stale:
            raise ValueError(
                f"{stale[0]}: label files must match their manifest, but this one is of an earlier run and there "
                "are no transcripts now; delete it or choose another output folder"
            )
    counts = _dictionary(out_dir / "dict.ltr.txt", splits, words) if words is not None else None

    out_dir.mkdir(parents=True, exist_ok=True)
    statistics = {}
    for split, paths in splits.items():
        write_manifest(
            out_dir / f"{split}.tsv", root, ((path.relative_to(root).as_posix(), samples[path]) for path in paths)
        )
        if words is not None:
            write_lines(out_dir / f"{split}.wrd", (words[path] for path in paths))
            write_lines(out_dir / f"{split}.ltr", (spell(words[path]) for path in paths))
        hours = sum(samples[path] for path in paths) / SAMPLE_RATE / 3600
        statistics[split] = {"utterances": len(paths), "hours": hours, "labels": float(words is not None)}
    if counts is not None:
        write_dictionary(out_dir / "dict.ltr.txt", counts)
    return statistics


def _read_lengths(root: Path, options: BuildOptions, progress: bool) -> dict[Path, int]:
    """Length in samples of each usable audio file below ``root``, in the order of their paths."""
    if not root.is_dir():
        raise ValueError(f"{root}: the folder of the audio must exist, but there is none; correct the path")
    endings = tuple(f".{ending.strip().lstrip('.').lower()}" for ending in options.endings)
    paths = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(endings) and not name.startswith(".")  # `._x.flac`: what macOS leaves on other disks
    )
    if not paths:
        raise ValueError(
            f"{root}: there must be audio files ending in {', '.join(endings)}, but there are none; "
            "correct the path or pass --ext"
        )

    def check(path: Path) -> int | AudioError:
        try:
            return check_audio(path).num_samples
        except AudioError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(options.max_workers) as pool:
        bar = tqdm(pool.map(check, paths), total=len(paths), desc="audio", unit=" files", disable=not progress)
        results = list(bar)
    errors = [result for result in results if isinstance(result, AudioError)]
    if errors:
        raise ValueError(_listing(f"{len(errors)} of {len(paths)} audio files cannot be used", list(map(str, errors))))
    shortest, longest = options.min_seconds * SAMPLE_RATE, options.max_seconds * SAMPLE_RATE
    samples = {path: int(length) for path, length in zip(paths, results, strict=True) if shortest <= length <= longest}
    if len(samples) < len(paths):
        logger.info("%d of %d files left out: shorter or longer than asked for", len(paths) - len(samples), len(paths))
    if not samples:
        raise ValueError(f"{root}: no file is within the lengths asked for; change --min-seconds or --max-seconds")
    return samples


def _read_words(paths: Sequence[Path], root: Path, options: BuildOptions) -> dict[Path, str] | None:
    """The normalised transcript of each file, or None where no file has one."""
    texts = find_transcripts(paths, root) if options.labels else {}
    if not texts:
        return None
    words: dict[Path, str] = {}
    problems = []
    for path in paths:
        try:
            words[path] = normalise(texts[path])
            if not words[path]:
                raise ValueError(f"a transcript must hold a word, but is {texts[path]!r}; correct it")
        except KeyError:
            problems.append(f"{path}: there is no transcript")
        except ValueError as error:
            words.pop(path, None)
            problems.append(f"{path}: {error}")
    if problems and not options.skip_untranscribed:
        summary = f"{len(problems)} of {len(paths)} files have no usable transcript, the others do"
        remedy = "add them, or pass --skip-untranscribed to leave these files out, or --no-labels to write no labels"
        raise ValueError(_listing(f"{summary}; {remedy}", problems))
    if not words:
        raise ValueError(_listing("no file has a usable transcript; pass --no-labels to write no labels", problems))
    if problems:
        logger.info(_listing(f"{len(problems)} of {len(paths)} files left out: no usable transcript", problems))
    return words


def _split(paths: Sequence[Path], options: BuildOptions) -> dict[str, list[Path]]:
    """Draws valid and test at random; each split is in the order of the paths."""
    if options.split is not None:
        return {options.split: list(paths)}
    drawn = random.Random(options.seed).sample(range(len(paths)), len(paths))
    splits = {}
    for name, fraction in (("valid", options.valid_fraction), ("test", options.test_fraction)):
        if fraction > 0:
            size = max(1, round(fraction * len(paths)))
            splits[name] = [paths[index] for index in sorted(drawn[:size])]
            drawn = drawn[size:]
    if not drawn:
        raise ValueError(
            f"the utterances must be enough for every split, but there are {len(paths)}; "
            "lower --valid-fraction and --test-fraction, or name one split with --split"
        )
    return {"train": [paths[index] for index in sorted(drawn)], **splits}


def _dictionary(path: Path, splits: dict[str, list[Path]], words: dict[Path, str]) -> dict[str, int]:
    """The dictionary there is, checked, or a new one: counts of the first split, 0 for what only others have."""
    letters = {split: count_symbols(spell(words[path]) for path in paths) for split, paths in splits.items()}
    used = {symbol for counts in letters.values() for symbol in counts}
    if not path.exists():
        counts = next(iter(letters.values()))
        return {**counts, **dict.fromkeys(sorted(used - counts.keys()), 0)}
    counts = read_dictionary(path)
    if unknown := sorted(used - counts.keys()):
        raise ValueError(
            f"{path}: the dictionary that is there must hold every letter, but lacks {', '.join(map(repr, unknown))}; "
            "delete it to have it made again (models that were trained with it need the old one)"
        )
    return counts


def _listing(summary: str, items: Sequence[str]) -> str:
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return "\n  ".join([f"{summary}:", *items[:MAX_LISTED], *more])
