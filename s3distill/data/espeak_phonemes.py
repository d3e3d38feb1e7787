"""The process that turns texts into phonemes with the espeak-ng library.

The library crashes on a few of its own dictionaries' words, so texts are translated in a fork, and a crash costs the
text that it happened on. Run by `s3distill.data.phoneme_inventory`; standard library only, so that the process is small.

stdin: one JSON object (voice, texts). stdout: a JSON line for each text, in order: its phonemes in IPA, words apart by
spaces and phonemes by `SEPARATOR`, or null where the library crashed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence

# From espeak-ng's speak_lib.h
AUDIO_OUTPUT_RETRIEVAL = 1
INITIALIZE_DONT_EXIT = 0x8000
CHARS_UTF8 = 1
PHONEMES_IPA = 0x02
SEPARATOR_SHIFT = 8  # bits 8 to 23 of the phoneme mode are the character between phonemes

SEPARATOR = "\u241f"  # in no phoneme's name


def load(library_path: str, data_path: str, voice: str) -> ctypes.CDLL:
    library = ctypes.CDLL(library_path)
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    rate = library.espeak_Initialize(AUDIO_OUTPUT_RETRIEVAL, 0, os.fsencode(data_path), INITIALIZE_DONT_EXIT)
    if rate <= 0:
        raise OSError(f"espeak_Initialize returned {rate} for the data in {data_path}")
    status = library.espeak_SetVoiceByName(voice.encode())
    if status != 0:
        raise OSError(f"espeak_SetVoiceByName returned {status} for the voice {voice!r}")
    return library


def translate(library: ctypes.CDLL, text: str) -> str:
    """The phonemes of one text; the library takes it clause by clause."""
    buffer = ctypes.create_string_buffer(text.encode())
    position = ctypes.c_void_p(ctypes.addressof(buffer))
    clauses = []
    while position.value:  # null behind the last clause
        mode = PHONEMES_IPA | ord(SEPARATOR) << SEPARATOR_SHIFT
        clauses.append(library.espeak_TextToPhonemes(ctypes.byref(position), CHARS_UTF8, mode) or b"")
    return b" ".join(clauses).decode("utf-8", errors="replace")


def translate_in_fork(library: ctypes.CDLL, texts: Sequence[str]) -> list[str]:
    """The lines for the first texts, up to the end or to the one that the library crashed on."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            with os.fdopen(sink, "w", encoding="utf-8") as stream:
                for text in texts:
                    stream.write(json.dumps(translate(library, text)) + "\n")
                    stream.flush()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(sink)
    with os.fdopen(source, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    os.waitpid(child, 0)
    return lines


def serve(library_path: str, data_path: str) -> None:
    request = json.load(sys.stdin)
    library = load(library_path, data_path, request["voice"])
    texts = request["texts"]
    while texts:
        lines = translate_in_fork(library, texts)
        if len(lines) < len(texts):
            lines.append("null")
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        texts = texts[len(lines) :]


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
