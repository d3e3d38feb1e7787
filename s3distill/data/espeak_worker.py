"""The process that holds the espeak-ng library: one request a line on stdin, 16-bit samples on stdout.

espeak-ng keeps the phase of its pitch flutter, its gain control and a cycle counter in static variables that no call
resets, so a text would sound a little different behind another one. Here every text is spoken in a fork of a process
that has never spoken: the same request gives the same bytes. Run by `s3distill.data.espeak`; standard library only,
so that the process is small and has no threads.

Request: a JSON object (text, voice, rate, pitch, range, seed). Reply: status, sample rate and size in bytes (three
little-endian int32), then that many bytes: samples where the status is 0, else a message.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from typing import BinaryIO

# From espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000  # without it the library calls exit(1) when its data is not found
CHARS_UTF8 = 1
POSITION_CHARACTER = 1
PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}

BUFFER_MS = 200  # one callback brings at most this much audio

OK, UNKNOWN_VOICE, FAILED = 0, 1, 2  # status of a reply
REPLY_HEADER = struct.Struct("<iii")

SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def initialise(library_path: str, data_path: str) -> tuple[ctypes.CDLL, int]:
    """Loads the library; returns it with its sample rate in Hz."""
    library = ctypes.CDLL(library_path)
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
    ]
    sample_rate = library.espeak_Initialize(
        AUDIO_OUTPUT_SYNCHRONOUS, BUFFER_MS, os.fsencode(data_path), INITIALIZE_DONT_EXIT
    )
    if sample_rate <= 0:
        raise OSError(f"espeak_Initialize returned {sample_rate} for the data in {data_path}")
    return library, sample_rate


def speak(library: ctypes.CDLL, request: dict) -> tuple[int, bytes]:
    """Speaks one request; returns the status of the reply and its bytes."""
    blocks: list[bytes] = []

    def collect(samples: ctypes._Pointer[ctypes.c_short], num_samples: int, events: int | None) -> int:
        # The buffer is the library's own and is overwritten by the next block: copy. A null pointer marks the end.
        if samples and num_samples > 0:
            blocks.append(ctypes.string_at(samples, num_samples * ctypes.sizeof(ctypes.c_short)))
        return 0

    callback = SynthCallback(collect)  # has to live until the text is spoken
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        return UNKNOWN_VOICE, b""
    library.espeak_ng_SetRandSeed(ctypes.c_long(request["seed"]))
    for name, parameter in PARAMETERS.items():
        library.espeak_SetParameter(parameter, request[name], 0)
    text = request["text"].encode()
    status = library.espeak_Synth(text, len(text) + 1, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
    if status != 0 or not blocks:
        return FAILED, f"espeak_Synth returned {status} and {len(blocks)} blocks of audio".encode()
    return OK, b"".join(blocks)


def reply(stream: BinaryIO, status: int, sample_rate: int, payload: bytes) -> None:
    stream.write(REPLY_HEADER.pack(status, sample_rate, len(payload)) + payload)
    stream.flush()


def serve(library_path: str, data_path: str) -> None:
    """Answers requests until stdin closes; the first reply says whether the library is up."""
    stream = sys.stdout.buffer
    try:
        library, sample_rate = initialise(library_path, data_path)
    except OSError as error:
        reply(stream, FAILED, 0, str(error).encode())
        return
    reply(stream, OK, sample_rate, b"")
    while line := sys.stdin.buffer.readline():
        child = os.fork()
        if child == 0:
            try:
                status, payload = speak(library, json.loads(line))
                reply(stream, status, sample_rate, payload)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        _, exit_status = os.waitpid(child, 0)
        if exit_status != 0:
            reply(stream, FAILED, sample_rate, f"the synthesis process ended with status {exit_status}".encode())


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
