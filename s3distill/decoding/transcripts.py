"""The transcripts of one decoding run, kept by utterance until they are scored and written in the manifest's order."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Transcript:
    """One utterance: units with spaces between them, and where it stands in the manifest."""

    utterance: int
    hypothesis: str
    reference: str


@dataclass
class Transcripts:
    """What a run has decoded so far.

    Attributes:
        words: per split, what was said as `.wrd` has it, by utterance; a split without `.wrd` is missing.
        has_word_boundary: whether ``|`` is a symbol, so that units join to words there.
        decode_seconds: time spent in model and decoder; audio_seconds: length of what was decoded.
    """

    words: dict[str, list[str]] = field(default_factory=dict)
    has_word_boundary: bool = True
    decode_seconds: float = 0.0
    audio_seconds: float = 0.0
    _by_utterance: dict[int, Transcript] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        self._by_utterance[transcript.utterance] = transcript

    def in_order(self) -> list[Transcript]:
        return [self._by_utterance[utterance] for utterance in sorted(self._by_utterance)]
