"""The n-best lists of one decoding run, kept by utterance until they are written in the manifest's order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from s3distill.data.nbest import Hypothesis, NbestEntry


@dataclass
class NbestLists:
    """What a run has kept so far.

    Attributes:
        audio: per split, the files of its utterances as the manifest has them.
        size: hypotheses to keep of each utterance.
    """

    audio: Mapping[str, Sequence[str]]
    size: int
    _by_utterance: dict[int, tuple[Hypothesis, ...]] = field(default_factory=dict)

    def add(self, utterance: int, hypotheses: Sequence[Hypothesis]) -> None:
        """Hypotheses of an utterance, best first."""
        self._by_utterance[utterance] = tuple(hypotheses)

    def entries(self, split: str) -> list[NbestEntry]:
        """The lists in the manifest's order."""
        return [NbestEntry(self.audio[split][i], self._by_utterance[i]) for i in sorted(self._by_utterance)]
