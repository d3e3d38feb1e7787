"""Text to speech with the espeak-ng library of the PyPI package `espeakng-loader`: where the demo corpus comes from.

The library runs in a small process of its own (`espeak_worker.py` says why), started once and kept.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from s3distill.data import espeak_worker

MIN_RATE_WPM, MAX_RATE_WPM = 80, 450  # espeak-ng's own limits
INSTALL_HINT = "pip install 's3distill[demo]'"

_MAX_DATA_PATH = 120  # bytes; espeak-ng cuts its data path at 160, the names of its files included
_LANGUAGE_FILES = {"en-gb": "en"}  # the library finds a voice by its file, and British English is in the file `en`
_lock = threading.Lock()


class _Worker:
    """The running synthesis process, and the voice variants that its data has."""

    def __init__(self, library_path: str, data_path: str) -> None:
        self.variants = frozenset(entry.name for entry in Path(data_path, "voices", "!v").glob("*"))
        self._link_folder: tempfile.TemporaryDirectory[str] | None = None
        if len(os.fsencode(data_path)) > _MAX_DATA_PATH:
            self._link_folder = tempfile.TemporaryDirectory(prefix="espeak-")
            link = Path(self._link_folder.name) / "espeak-ng-data"
            link.symlink_to(data_path)
            data_path = str(link)
        command = [sys.executable, "-I", espeak_worker.__file__, library_path, data_path]
        # A session of its own: Ctrl-C is for us, and the worker ends with its stdin
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        atexit.register(self.close)
        status, _, payload = self._read_reply()
        if status != espeak_worker.OK:
            self.close()
            raise RuntimeError(
                f"the espeak-ng library {library_path} does not start ({payload.decode(errors='replace')}); "
                f"install it again: {INSTALL_HINT} --force-reinstall"
            )

    def _read_reply(self) -> tuple[int, int, bytes]:
        assert self.process.stdout is not None
        header = self.process.stdout.read(espeak_worker.REPLY_HEADER.size)
        if len(header) < espeak_worker.REPLY_HEADER.size:
            self.close()
            _worker.cache_clear()
            return espeak_worker.FAILED, 0, f"its process ended with status {self.process.returncode}".encode()
        status, sample_rate, size = espeak_worker.REPLY_HEADER.unpack(header)
        return status, sample_rate, self.process.stdout.read(size)

    def ask(self, request: dict[str, str | int]) -> tuple[int, int, bytes]:
        """Sends one request; returns status, sample rate and payload."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self._read_reply()

    def close(self) -> None:
        """Ends the process: it stops when its stdin closes."""
        atexit.unregister(self.close)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        if self._link_folder is not None:
            self._link_folder.cleanup()


@functools.lru_cache(maxsize=1)
def _worker(process_id: int) -> _Worker:
    """The worker of this process; a fork of ours starts its own instead of sharing the pipes."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise RuntimeError(
            "demo speech needs the espeak-ng library of the package `espeakng-loader`, which is not installed; "
            f"run: {INSTALL_HINT}"
        ) from error
    return _Worker(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())


def synthesise(
    text: str, voice: str = "en-us", rate_wpm: int = 160, pitch: int = 50, pitch_range: int = 50, seed: int = 1
) -> tuple[np.ndarray, int]:
    """Speaks a text; the same arguments give the same samples, whatever was spoken before.

    Args:
        text: what to say.
        voice: espeak-ng language with an optional variant, such as ``en-us`` or ``en-gb+f2``.
        rate_wpm: speed in words per minute, 80 to 450.
        pitch: base pitch, 0 to 100 (50 is the voice's own).
        pitch_range: liveliness of the intonation, 0 (monotone) to 100.
        seed: seed of the library's own noise generator (breath of some variants).
    Returns:
        Samples in [-1, 1), float32 [S], and their sample rate in Hz (22050 for espeak-ng's formant voices).
    Raises:
        ValueError: unknown voice, empty text, or a number out of range.
        RuntimeError: the library is missing or fails.
    """
    _check_arguments(text, rate_wpm, pitch, pitch_range)
    language, _, variant = voice.partition("+")
    name = _LANGUAGE_FILES.get(language, language) + (f"+{variant}" if variant else "")
    request: dict[str, str | int] = {
        "text": text,
        "voice": name,
        "rate": rate_wpm,
        "pitch": pitch,
        "range": pitch_range,
        "seed": seed,
    }
    with _lock:
        worker = _worker(os.getpid())
        # The library ignores a variant that it does not know, in silence: look it up here.
        if variant and variant not in worker.variants:
            status, sample_rate, payload = espeak_worker.UNKNOWN_VOICE, 0, b""
        else:
            status, sample_rate, payload = worker.ask(request)
    if status == espeak_worker.UNKNOWN_VOICE:
        raise ValueError(
            f"`voice` must name an espeak-ng language with an optional variant, but is {voice!r}; "
            "try 'en-us', 'en-gb' or 'en-us+f2'"
        )
    if status != espeak_worker.OK:
        raise RuntimeError(
            f"espeak-ng could not speak {text!r} with voice {voice!r}: {payload.decode(errors='replace')}; "
            "try another voice or text"
        )
    return np.frombuffer(payload, dtype=np.int16).astype(np.float32) / 32768.0, sample_rate


def _check_arguments(text: str, rate_wpm: int, pitch: int, pitch_range: int) -> None:
    if not text.strip():
        raise ValueError("`text` must hold something to say, but is empty; pass a word")
    if not MIN_RATE_WPM <= rate_wpm <= MAX_RATE_WPM:
        raise ValueError(
            f"`rate_wpm` must be in [{MIN_RATE_WPM}, {MAX_RATE_WPM}], but is {rate_wpm}; 160 is a calm speaker"
        )
    for name, value in (("pitch", pitch), ("pitch_range", pitch_range)):
        if not 0 <= value <= 100:
            raise ValueError(f"`{name}` must be in [0, 100], but is {value}; 50 is the voice's own")
