"""Wav2vec manifests: `.tsv` files of audio with their label files and dictionary, read, written and checked.

Line 1 of a `.tsv` is the root folder, absolute or relative to the manifest's own folder; every other line is
`path<TAB>number of samples`. Line i of a label file (`.ltr`, `.wrd`) belongs to line i + 1 of the `.tsv`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from s3distill.data import manifest_check
from s3distill.data.manifest_lines import Fault, Manifest, parse_dictionary, parse_manifest, read_lines

PathLike = str | os.PathLike[str]

MAX_LISTED_FAULTS = 5  # in the one error that stops a training run


def read_manifest(path: PathLike) -> Manifest:
    """Reads a manifest; raises `ValueError` with its first fault."""
    manifest, faults = parse_manifest(path)
    _raise_first(faults)
    return manifest


def read_labels(path: PathLike) -> list[str]:
    """The lines of a label file, as they are; raises `ValueError` where it cannot be read."""
    lines, faults = read_lines(path, "label file")
    _raise_first(faults)
    return lines


def read_dictionary(path: PathLike) -> dict[str, int]:
    """Reads a fairseq dictionary: symbol -> count, in the file's order; raises `ValueError` with its first fault."""
    counts, faults = parse_dictionary(path)
    _raise_first(faults)
    return counts


def write_manifest(path: PathLike, root: PathLike, entries: Iterable[tuple[str, int]]) -> None:
    """Writes a manifest whole or not at all; ``root`` is written as given (``.`` means the manifest's own folder)."""
    lines = [os.fspath(root), *(f"{relative}\t{num_samples}" for relative, num_samples in entries)]
    for number, line in enumerate(lines, start=1):
        if "\n" in line or line.count("\t") != (number > 1):
            raise ValueError(
                f"a path in a manifest must have no tab and no newline, but line {number} is {line!r}; rename it"
            )
    write_lines(path, lines)


def write_dictionary(path: PathLike, counts: Mapping[str, int]) -> None:
    """Writes a fairseq dictionary, `symbol count` a line, in the order given."""
    write_lines(path, (f"{symbol} {count}" for symbol, count in counts.items()))


def write_lines(path: PathLike, lines: Iterable[str]) -> None:
    """Writes a UTF-8 text file under a temporary name beside it, then renames it: it is there whole or not at all."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def current_umask() -> int:
    """The umask of this process, which `tempfile` leaves out of account; Python can only read it by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_manifest(
    path: PathLike,
    labels: Sequence[PathLike] = (),
    dictionary: PathLike | None = None,
    max_workers: int = 4,
    progress: bool = True,
) -> list[Fault]:
    """Checks a manifest with its audio, labels and dictionary, and lists everything that is wrong.

    Checked: every line; every audio file (there, readable to its end, 16 kHz, mono, of the stated length, long enough
    for a frame); number of label lines, empty ones, symbols that the dictionary lacks, lines too long for CTC at 50 Hz,
    letters that do not spell the words. A label file with one word on every line and no dictionary beside it holds the
    classes of utterances (`.digit`), which need none.

    Args:
        path: the `.tsv` file.
        labels: label files, as endings beside the manifest (``"ltr"``) or as paths.
        dictionary: dictionary of the label files other than `.wrd`; by default ``dict.ENDING.txt`` beside them.
        max_workers: threads that read audio headers.
        progress: show a progress bar.
    Returns:
        The faults, in the order of the files and lines; empty where all is well.
    """
    manifest, faults = parse_manifest(path)
    if not manifest.entries:
        return faults
    faults += manifest_check.length_faults(manifest)
    root_faults = manifest_check.root_faults(manifest)
    indices = () if root_faults else range(len(manifest.entries))
    faults += root_faults
    faults += manifest_check.audio_faults(manifest, indices, max_workers, check_end=True, progress=progress)
    label_paths = [label_path(path, label) for label in labels]
    checked_dictionaries: set[Path] = set()
    for labels_file in label_paths:
        symbols = None
        if labels_file.suffix != ".wrd" and (dictionary or not _holds_classes(labels_file)):
            dictionary_path = Path(dictionary or labels_file.with_name(f"dict{labels_file.suffix}.txt"))
            symbols, dictionary_faults = parse_dictionary(dictionary_path)
            faults += dictionary_faults if dictionary_path not in checked_dictionaries else []
            checked_dictionaries.add(dictionary_path)
        frames_of = None if symbols is None else manifest_check.num_frames
        # Without one readable symbol the dictionary's own fault is enough: every label would be unknown.
        faults += manifest_check.label_faults(manifest, labels_file, symbols or None, frames_of)
    by_ending = {labels_file.suffix: labels_file for labels_file in label_paths}
    if ".wrd" in by_ending and ".ltr" in by_ending:
        faults += manifest_check.spelling_faults(by_ending[".wrd"], by_ending[".ltr"])
    return faults


def _holds_classes(label_path: Path) -> bool:
    """Whether a label file without a dictionary has one word on every line that is not empty."""
    if label_path.with_name(f"dict{label_path.suffix}.txt").exists():
        return False
    lines, faults = read_lines(label_path, "label file")
    return not faults and any(lines) and all(len(line.split()) <= 1 for line in lines)


def validate_for_training(
    manifest_path: PathLike,
    label_path: PathLike | None = None,
    dict_path: PathLike | None = None,
    probe_audio: int = 8,
    min_samples: int = 0,
    max_workers: int = 8,
    frames_of: Callable[[int], int] | None = None,
) -> Manifest:
    """The fast checks before training starts; raises one `ValueError` with the first faults.

    Checked: all lines of the manifest, that every audio file is there, the headers of a few files, number of label
    lines, empty ones, and symbols that the dictionary lacks.

    Args:
        manifest_path: the `.tsv` file.
        label_path: its label file, or None.
        dict_path: the dictionary of the labels, or None where they are words.
        probe_audio: number of audio files, spread over the manifest, whose rate, channels and length are checked.
        min_samples: refuse shorter utterances; 0 where the task leaves them out itself.
        max_workers: threads that look for files.
        frames_of: samples -> frames of a model that is trained with CTC, which the label lines must fit; None leaves it open.
    Returns:
        The manifest.
    """
    manifest, faults = parse_manifest(manifest_path)
    faults += manifest_check.length_faults(manifest, min_samples)
    missing = manifest_check.root_faults(manifest) or list(manifest_check.missing_file_faults(manifest, max_workers))
    faults += missing if manifest.entries else []
    if not missing:
        num_entries = len(manifest.entries)
        indices = sorted({i * num_entries // probe_audio for i in range(probe_audio)}) if num_entries else []
        faults += manifest_check.audio_faults(manifest, indices, max_workers, check_end=False, progress=False)
    symbols: dict[str, int] | None = None
    if dict_path is not None:
        symbols, dictionary_faults = parse_dictionary(dict_path)
        faults += dictionary_faults
    if label_path is not None and manifest.entries:
        faults += manifest_check.label_faults(manifest, Path(label_path), symbols or None, frames_of)
    if faults:
        listed = "\n  ".join(map(str, faults[:MAX_LISTED_FAULTS]))
        more = len(faults) - MAX_LISTED_FAULTS
        rest = f"\n  and {more} more; `s3distill check {os.fspath(manifest_path)}` lists all" if more > 0 else ""
        raise ValueError(f"{os.fspath(manifest_path)} cannot be trained on:\n  {listed}{rest}")
    return manifest


def label_path(manifest_path: PathLike, label: PathLike) -> Path:
    """The label file of a manifest: ``label`` is an ending beside it (``ltr``) or a path of its own."""
    text = os.fspath(label)
    is_ending = os.sep not in text and "." not in text
    return Path(manifest_path).with_suffix(f".{text}") if is_ending else Path(text)


def _raise_first(faults: list[Fault]) -> None:
    if faults:
        raise ValueError(str(faults[0]))
