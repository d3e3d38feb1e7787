"""What can be wrong between a manifest and its audio, labels and dictionary, as lists of faults.

The checks behind `manifest.check_manifest` (all of them) and `manifest.validate_for_training` (the fast ones).
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from s3distill.data.audio import AudioError, check_audio
from s3distill.data.manifest_lines import Fault, Manifest, read_lines
from s3distill.data.transcripts import spell
from s3distill.encoder.config import SAMPLE_RATE

RECEPTIVE_FIELD = 400  # samples that the first frame of a wav2vec 2.0 / HuBERT extractor sees
HOP = 320  # samples from one frame to the next: 50 Hz


def num_frames(num_samples: int) -> int:
    """Frames that the standard extractor makes of an utterance."""
    return max(0, (num_samples - RECEPTIVE_FIELD) // HOP + 1)


def length_faults(manifest: Manifest, min_samples: int = RECEPTIVE_FIELD) -> Iterator[Fault]:
    """Entries that are too short to give a frame."""
    for (relative, num_samples), line in zip(manifest.entries, manifest.lines, strict=True):
        if num_samples < min_samples:
            rule, found = f"an utterance must have at least {min_samples} samples", f"{relative!r} has {num_samples}"
            yield Fault(str(manifest.path), line, rule, found, "remove the line (and its label lines)")


def root_faults(manifest: Manifest) -> list[Fault]:
    """The one fault that would otherwise come once per audio file."""
    if manifest.root.is_dir():
        return []
    rule, found = "line 1 must be the root folder of the audio", f"there is no folder {manifest.root}"
    return [Fault(str(manifest.path), 1, rule, found, "correct it (a relative one starts at the manifest's folder)")]


def missing_file_faults(manifest: Manifest, max_workers: int) -> Iterator[Fault]:
    """Entries whose file is not there (one `stat` each)."""
    paths = [manifest.audio_path(index) for index in range(len(manifest.entries))]
    with concurrent.futures.ThreadPoolExecutor(max_workers) as pool:
        for path, line, there in zip(paths, manifest.lines, pool.map(os.path.isfile, paths), strict=True):
            if not there:
                remedy = f"correct the path, or the root on line 1 ({manifest.root})"
                yield Fault(str(manifest.path), line, "an audio file must exist", f"there is no {path}", remedy)


def audio_faults(
    manifest: Manifest, indices: Sequence[int], max_workers: int, check_end: bool, progress: bool
) -> Iterator[Fault]:
    """Entries whose file cannot be used, or has not the length that the manifest states."""

    def check(index: int) -> Fault | None:
        path, line, stated = manifest.audio_path(index), manifest.lines[index], manifest.entries[index][1]
        try:
            info = check_audio(path, SAMPLE_RATE, check_end)
        except AudioError as error:
            rule, found, remedy = error.problem
            return Fault(str(manifest.path), line, f"{path}: {rule}", found, remedy)
        if info.num_samples != stated:
            rule, found = f"{path}: the file must have the {stated} samples of this line", f"it has {info.num_samples}"
            return Fault(str(manifest.path), line, rule, found, "write the manifest again")
        return None

    with concurrent.futures.ThreadPoolExecutor(max_workers) as pool:
        results = pool.map(check, indices)
        bar = tqdm(results, total=len(indices), desc=manifest.path.name, unit=" files", disable=not progress)
        yield from (fault for fault in bar if fault is not None)


def label_faults(
    manifest: Manifest,
    label_path: Path,
    symbols: Mapping[str, int] | None,
    frames_of: Callable[[int], int] | None = num_frames,
) -> Iterator[Fault]:
    """Faults of a label file.

    Args:
        manifest: the manifest that it belongs to.
        label_path: the label file.
        symbols: the dictionary, or None for lines that are not made of its symbols (`.wrd`).
        frames_of: samples -> frames, which a line must fit, as CTC needs; None: any line will do.
    """
    lines, faults = read_lines(label_path, "label file")
    yield from faults
    if faults:
        return
    if len(lines) != manifest.num_lines:
        rule = f"a label file must have a line for each of the {manifest.num_lines} utterances of {manifest.path}"
        yield Fault(str(label_path), None, rule, f"it has {len(lines)}", "write manifest and labels again, together")
    samples = {line - 1: entry[1] for line, entry in zip(manifest.lines, manifest.entries, strict=True)}
    for number, line in enumerate(lines, start=1):
        labels = line.split()
        if not labels:
            remedy = "add the transcript, or remove the utterance"
            yield Fault(str(label_path), number, "a label line must not be empty", "it is", remedy)
            continue
        unknown = sorted(set(labels) - symbols.keys()) if symbols is not None else []
        if unknown:
            rule, found = "a label must be in the dictionary", f"{', '.join(map(repr, unknown))} is not"
            yield Fault(str(label_path), number, rule, found, "correct the line, or make the dictionary again")
        if frames_of is not None and number in samples:
            repeats = sum(left == right for left, right in itertools.pairwise(labels))
            frames = frames_of(samples[number])
            if len(labels) + repeats > frames:
                rule = f"CTC needs a frame for each of {len(labels)} labels and {repeats} repeated ones"
                yield Fault(str(label_path), number, rule, f"there are {frames}", "correct or remove the utterance")


def spelling_faults(words_path: Path, letters_path: Path) -> Iterator[Fault]:
    """Lines of a `.ltr` file that do not spell the words of the `.wrd` file."""
    words, letters = (read_lines(path, "label file")[0] for path in (words_path, letters_path))
    for number, (word_line, letter_line) in enumerate(zip(words, letters, strict=False), start=1):
        if not word_line.split() or not letter_line.split():
            continue  # `label_faults` has that
        # fairseq's own recipe writes a `|` behind the last word, others leave it out
        if f"{letter_line.strip().removesuffix(' |')} |" != spell(word_line):
            rule = f"the letters must spell the words of {words_path}"
            found = f"{letter_line.strip()!r} is not {word_line.strip()!r}"
            yield Fault(str(letters_path), number, rule, found, "write both again")
