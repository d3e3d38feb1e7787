"""The transcripts of one decoding run, kept by utterance until they are scored and written in the manifest's order."""

from __future__ import annotations

from dataclasses import dataclass, field

from s3distill.decoding.words import TimedWord


@dataclass(frozen=True)
class Transcript:
    """One utterance: units with spaces between them, and where it stands in the manifest.

    Attributes:
        words: what was decoded, as the lexicon spells it; None: the units say.
        confidence: mean posterior of the symbols over their frames; None where the decoder does not say.
        times: the words with their times.
    """

    utterance: int
    hypothesis: str
    reference: str
    words: str | None = None
    confidence: float | None = None
    times: tuple[TimedWord, ...] = ()


@dataclass
class Transcripts:
    """What a run has decoded so far.

    Attributes:
        words: per split, what was said as `.wrd` has it, by utterance; a split without `.wrd` is missing.
        has_word_boundary: whether ``|`` is a symbol, so that units join to words there.
        has_pieces: whether units are sentencepiece's.
        audio: per split, the files of its utterances as the manifest has them.
        decode_seconds: time spent in model and decoder; search_seconds: in the decoder alone; audio_seconds: length of what was decoded.
    """

    words: dict[str, list[str]] = field(default_factory=dict)
    has_word_boundary: bool = True
    has_pieces: bool = False
    audio: dict[str, list[str]] = field(default_factory=dict)
    decode_seconds: float = 0.0
    search_seconds: float = 0.0
    audio_seconds: float = 0.0
    _by_utterance: dict[int, Transcript] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        self._by_utterance[transcript.utterance] = transcript

    def in_order(self) -> list[Transcript]:
        return [self._by_utterance[utterance] for utterance in sorted(self._by_utterance)]
