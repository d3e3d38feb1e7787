"""The demo corpus: synthetic speech of one language with wav2vec manifests, the first thing that the quickstart makes.

Sentences come from `demo_grammar` and the words of `demo_languages`, voices from espeak-ng. No sentence and no voice
variant of valid or test is in train. `demo_multilingual` makes one such corpus per language, and a pooled one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from s3distill.data.demo_grammar import SentenceSource
from s3distill.data.demo_languages import LANGUAGES, check_languages
from s3distill.data.demo_readme import corpus_readme
from s3distill.data.espeak import synthesise
from s3distill.data.manifest import current_umask, read_manifest, write_dictionary, write_lines, write_manifest
from s3distill.data.transcripts import count_symbols, spell
from s3distill.encoder.config import SAMPLE_RATE

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
# espeak-ng's voice variants; those of valid and test differ from train's in formants, pitch or voicing
VARIANTS = {
    "train": ("m1", "m3", "m4", "m7", "m8", "Mike", "Gene", "adam", "f1", "f2", "f4", "Annie"),
    "valid": ("max", "aunty"),
    "test": ("m2", "m6", "Michael", "f3"),
}

RATES_WPM = (130, 175)
PITCHES = (38, 62)  # espeak-ng's scale; 50 is the voice's own
PITCH_RANGES = (35, 65)
PEAKS = (0.35, 0.8)  # of full scale, so that nothing clips
EDGE_SILENCE_S = (0.05, 0.1)
SILENCE_LEVEL = 0.01  # of the utterance's peak: what is softer at its ends is cut

FORMAT_VERSION = 1  # raised when the same settings would give other bytes
MAX_HELD_OUT_MINUTES = 40.0  # valid and test together; more would take too many of the grammar's sentences from train


@dataclass(frozen=True)
class DemoSettings:
    """What decides the bytes of a demo corpus; lengths in minutes of audio."""

    train_minutes: float = 20.0
    valid_minutes: float = 1.5
    test_minutes: float = 4.0
    seed: int = 1
    language: str = "en"

    def __post_init__(self) -> None:
        check_languages([self.language])
        for name in ("train_minutes", "valid_minutes", "test_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"`{name}` must be above 0, but is {getattr(self, name)}; the default is 20, 1.5 and 4"
                )
        if self.valid_minutes + self.test_minutes > MAX_HELD_OUT_MINUTES:
            raise ValueError(
                f"`valid_minutes` and `test_minutes` must be at most {MAX_HELD_OUT_MINUTES:g} together, but are "
                f"{self.valid_minutes + self.test_minutes:g}; the grammar has too few sentences to hold out more"
            )


def make_demo_corpus(
    out_dir: str | os.PathLike[str],
    train_minutes: float = 20.0,
    valid_minutes: float = 1.5,
    test_minutes: float = 4.0,
    seed: int = 1,
    progress: bool = True,
    language: str = "en",
) -> dict[str, dict[str, float]]:
    """Writes a demo corpus, or leaves it as it is where the same settings made it before.

    It is written to a temporary folder beside ``out_dir`` and renamed when it is whole.

    Args:
        out_dir: the corpus folder; an older demo corpus there is replaced, anything else is left alone.
        train_minutes, valid_minutes, test_minutes: least length of each split.
        seed: decides sentences, voices, speeds, pitches and levels; the same seed gives the same bytes.
        progress: show a progress bar.
        language: a key of `demo_languages.LANGUAGES`.
    Returns:
        Per split: ``utterances``, ``minutes``, ``words``, ``voices``.
    Raises:
        ValueError: a setting out of range, or ``out_dir`` holds something else than a demo corpus.
        RuntimeError: the espeak-ng library is missing.
    """
    settings = DemoSettings(train_minutes, valid_minutes, test_minutes, seed, language)
    out_dir = Path(out_dir)
    require_replaceable(out_dir)
    statistics = reusable(out_dir, settings)
    if statistics is not None:
        logger.info("%s: reused, it was made with the same settings", out_dir)
        return statistics
    with fresh_folder(out_dir) as work_dir:
        statistics = write_corpus(work_dir, settings, progress)
    logger.info("%s: %s", out_dir, ", ".join(f"{s} {v['utterances']} utterances" for s, v in statistics.items()))
    return statistics


def require_replaceable(out_dir: Path) -> None:
    """Raises `ValueError` where ``out_dir`` holds something else than a demo corpus."""
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "demo.json").is_file():
        raise ValueError(
            f"{out_dir}: the output must be a new or empty folder or an older demo corpus, but holds other files; "
            "choose another folder"
        )


@contextlib.contextmanager
def fresh_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside ``out_dir`` that takes its place when the block ends well, and goes where it does not."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield work_dir
        os.chmod(work_dir, 0o777 & ~current_umask())
        if out_dir.exists():
            old_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
            os.replace(out_dir, old_dir)
            os.replace(work_dir, out_dir)
            shutil.rmtree(old_dir)
        else:
            os.replace(work_dir, out_dir)
    except BaseException:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise


def _description(settings: DemoSettings) -> dict[str, object]:
    record = {"format": FORMAT_VERSION, "synthetic": True, **dataclasses.asdict(settings)}
    if settings.language == "en":
        del record["language"]  # English was there before the others, and its corpus keeps its bytes
    return record


def reusable(out_dir: Path, settings: DemoSettings) -> dict[str, dict[str, float]] | None:
    """The statistics of the corpus in ``out_dir`` if it was made with these settings and all its files are there."""
    try:
        record = json.loads((out_dir / "demo.json").read_text(encoding="utf-8"))
        if record["settings"] != _description(settings):
            return None
        for split in SPLITS:
            manifest = read_manifest(out_dir / f"{split}.tsv")
            files = [*(f"{split}.{ending}" for ending in ("ltr", "wrd")), *(path for path, _ in manifest.entries)]
            if not all((out_dir / name).is_file() for name in ["dict.ltr.txt", "README.txt", *files]):
                return None
        return record["statistics"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not whole: make it again


def voices(language: str, split: str) -> tuple[str, ...]:
    """The espeak-ng voices of a split: each variant with each accent of the language."""
    accents = LANGUAGES[language].accents
    return tuple(f"{accent}+{variant}" for variant in VARIANTS[split] for accent in accents)


def write_corpus(work_dir: Path, settings: DemoSettings, progress: bool) -> dict[str, dict[str, float]]:
    """Writes all files of a corpus to an empty folder; returns its statistics per split."""
    language = settings.language
    statistics: dict[str, dict[str, float]] = {}
    held_out: set[str] = set()  # sentences of test and valid: drawn first, so that train can keep away from them
    total_s = 60 * round(settings.train_minutes + settings.valid_minutes + settings.test_minutes, 3)
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of speech [{elapsed}<{remaining}]"
    with tqdm(total=total_s, desc=f"demo speech, {language}", bar_format=layout, disable=not progress) as bar:
        for split in reversed(SPLITS):
            minutes = getattr(settings, f"{split}_minutes")
            # Another stream per language, so that their corpora are not the same sentence by sentence
            rng = random.Random(f"{settings.seed} {split}" + (f" {language}" if language != "en" else ""))
            entries, sentences = _write_split(work_dir, language, split, minutes, rng, held_out, bar)
            write_manifest(work_dir / f"{split}.tsv", ".", entries)
            write_lines(work_dir / f"{split}.wrd", sentences)
            write_lines(work_dir / f"{split}.ltr", map(spell, sentences))
            if split == "train":
                write_dictionary(work_dir / "dict.ltr.txt", count_symbols(map(spell, sentences)))
            statistics[split] = {
                "utterances": len(entries),
                "minutes": round(sum(num_samples for _, num_samples in entries) / SAMPLE_RATE / 60, 3),
                "words": sum(len(sentence.split()) for sentence in sentences),
                "voices": min(len(voices(language, split)), len(entries)),
            }
    statistics = {split: statistics[split] for split in SPLITS}
    write_lines(work_dir / "README.txt", corpus_readme(language, statistics).splitlines())
    record = {"settings": _description(settings), "statistics": statistics}
    write_lines(work_dir / "demo.json", [json.dumps(record, indent=2)])
    return statistics


def _write_split(
    work_dir: Path, language: str, split: str, minutes: float, rng: random.Random, held_out: set[str], bar: tqdm
) -> tuple[list[tuple[str, int]], list[str]]:
    """Speaks sentences, the voices in turn, until the split is long enough; valid's and test's go to ``held_out``."""
    (work_dir / split).mkdir()
    source = SentenceSource(rng, LANGUAGES[language].grammar)
    turn = itertools.cycle(voices(language, split))
    entries: list[tuple[str, int]] = []
    sentences: list[str] = []
    missing = round(minutes * 60 * SAMPLE_RATE)
    while missing > 0:
        sentence = source.next(forbidden=held_out)
        if split != "train":
            held_out.add(sentence)
        voice = next(turn)
        samples = _speak(sentence, voice, rng)
        name = f"{split}/{len(entries):05d}-{voice.replace('+', '-')}.flac"
        soundfile.write(work_dir / name, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        entries.append((name, len(samples)))
        sentences.append(sentence)
        bar.update(min(len(samples), missing) / SAMPLE_RATE)  # tqdm forgets a total that is overrun
        missing -= len(samples)
    return entries, sentences


def _speak(sentence: str, voice: str, rng: random.Random) -> np.ndarray:
    """One utterance at 16 kHz, int16 [S]: random speed, pitch, level and length of the silence at both ends."""
    from scipy.signal import resample_poly  # here, so that `s3distill demo-data --help` and a reuse need no scipy

    samples, rate = synthesise(
        sentence.lower(), voice, rng.randint(*RATES_WPM), rng.randint(*PITCHES), rng.randint(*PITCH_RANGES), seed=1
    )
    samples = resample_poly(samples.astype(np.float64), SAMPLE_RATE, rate)
    loud = np.flatnonzero(np.abs(samples) > SILENCE_LEVEL * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    samples *= rng.uniform(*PEAKS) / np.abs(samples).max()
    edges = tuple(round(rng.uniform(*EDGE_SILENCE_S) * SAMPLE_RATE) for _ in range(2))
    return np.round(np.pad(samples, edges) * 32767).astype(np.int16)
