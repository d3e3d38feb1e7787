"""Audio files, read with soundfile and checked: one clear error for each thing that can be wrong with one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from s3distill.encoder.config import SAMPLE_RATE

PathLike = str | os.PathLike[str]


class AudioInfo(NamedTuple):
    """The header of an audio file: rate in Hz, channels, length in samples per channel."""

    sample_rate: int
    num_channels: int
    num_samples: int


class Problem(NamedTuple):
    """What is wrong with an audio file, as the parts of a message: the rule, what came, the remedy."""

    rule: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule}, but {self.found}; {self.remedy}"


class AudioError(ValueError):
    """An audio file that cannot be used."""

    def __init__(self, path: PathLike, problem: Problem) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.problem = problem


def audio_info(path: PathLike) -> AudioInfo:
    """Reads the header of an audio file; raises `AudioError` where there is none to read."""
    with _open(path) as stream:
        return AudioInfo(stream.samplerate, stream.channels, stream.frames)


def read_audio(path: PathLike, expected_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Reads a mono file whole.

    Args:
        path: `.flac`, `.wav` or what else libsndfile reads.
        expected_rate: required sample rate, Hz.
    Returns:
        Samples in [-1, 1], float32 [S], S > 0.
    Raises:
        AudioError (a ValueError): missing, unreadable, empty or truncated file, wrong rate, more than one channel.
    """
    with _open(path) as stream:
        _check_header(path, AudioInfo(stream.samplerate, stream.channels, stream.frames), expected_rate)
        try:
            samples = stream.read(dtype="float32")
        except soundfile.SoundFileError as error:
            raise AudioError(path, _truncated(stream.frames, str(error))) from error
        if len(samples) < stream.frames:
            raise AudioError(path, _truncated(stream.frames, f"it ends after {len(samples)}"))
    return samples


def check_audio(path: PathLike, expected_rate: int = SAMPLE_RATE, check_end: bool = True) -> AudioInfo:
    """Checks a file as `read_audio` would, but decodes no more of it than its last sample (with ``check_end``).

    Returns:
        The header.
    Raises:
        AudioError: as `read_audio`.
    """
    with _open(path) as stream:
        info = AudioInfo(stream.samplerate, stream.channels, stream.frames)
        _check_header(path, info, expected_rate)
        if check_end:
            try:
                stream.seek(info.num_samples - 1)
                complete = len(stream.read(1, dtype="float32")) == 1
            except soundfile.SoundFileError as error:
                raise AudioError(path, _truncated(info.num_samples, str(error))) from error
            if not complete:
                raise AudioError(path, _truncated(info.num_samples, "the last ones are missing"))
    return info


def _open(path: PathLike) -> soundfile.SoundFile:
    if not os.path.exists(path):
        raise AudioError(path, Problem("an audio file must exist", "there is none", "correct the path or the root"))
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise AudioError(path, Problem("an audio file must hold audio", "it has 0 bytes", "copy or convert it again"))
    try:
        return soundfile.SoundFile(os.fspath(path))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a headerless .raw file
        reason = str(error).rpartition(": ")[2].rstrip(".")
        problem = Problem("an audio file must be readable", f"libsndfile says {reason!r}", "copy or convert it again")
        raise AudioError(path, problem) from error


def _check_header(path: PathLike, info: AudioInfo, expected_rate: int) -> None:
    name = Path(path).name
    converted = f"{Path(path).stem}_{expected_rate // 1000}k.flac"
    remedy = f"convert it: sox '{name}' -r {expected_rate} -c 1 '{converted}'"
    if info.sample_rate != expected_rate:
        rule = f"the sample rate must be {expected_rate} Hz"
        raise AudioError(path, Problem(rule, f"it is {info.sample_rate} Hz", remedy))
    if info.num_channels != 1:
        raise AudioError(path, Problem("audio must be mono", f"it has {info.num_channels} channels", remedy))
    if info.num_samples == 0:
        raise AudioError(path, Problem("an audio file must hold audio", "it has 0 samples", "copy or convert it again"))


def _truncated(num_samples: int, reason: str) -> Problem:
    return Problem(f"the file must hold the {num_samples} samples of its header", reason, "copy or convert it again")
