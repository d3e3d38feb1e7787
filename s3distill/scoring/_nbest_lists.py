"""The n-best lists of one decoding run, kept by utterance until they are written in the manifest's order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from s3distill.data.nbest import Hypothesis, NbestEntry


@dataclass
class NbestLists:
    """What a run has kept so far.

    Attributes:
        audio: per split, the files of the utterances that are decoded, as the manifest has them.
        manifests: per split, the files of all its utterances, those too that are too short to be decoded.
        size: hypotheses to keep of each utterance.
    """

    audio: Mapping[str, Sequence[str]]
    manifests: Mapping[str, Sequence[str]]
    size: int
    _by_utterance: dict[int, tuple[Hypothesis, ...]] = field(default_factory=dict)

    def add(self, utterance: int, hypotheses: Sequence[Hypothesis]) -> None:
        """Hypotheses of an utterance, best first."""
        self._by_utterance[utterance] = tuple(hypotheses)

    def entries(self, split: str) -> list[NbestEntry]:
        """The lists in the manifest's order, empty ones of utterances that were left out; a part of a run (shards) has a part."""
        decoded = self.audio[split]
        found = {name: () for name in set(self.manifests[split]) - set(decoded)}
        found |= {decoded[i]: hypotheses for i, hypotheses in self._by_utterance.items()}
        return [NbestEntry(name, found[name]) for name in self.manifests[split] if name in found]
