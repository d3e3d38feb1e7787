"""fairseq's beam search for models with a decoder, with the transcripts kept that `s3_wer` scores."""

import logging
import time
from typing import Any

from fairseq import utils
from fairseq.data import Dictionary
from torch import Tensor

from s3distill.data.nbest import Hypothesis
from s3distill.decoding.transcripts import Transcript, Transcripts
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.scoring._nbest_lists import NbestLists

logger = logging.getLogger(__name__)


class Seq2SeqGenerator:
    """What `fairseq-generate` calls for each batch of a model with a decoder.

    Args:
        search: fairseq's `SequenceGenerator`.
        dictionary: symbols of the model's output.
        words: see `Transcripts.words`.
        nbest: takes the hypotheses of each utterance, or None.
    """

    def __init__(
        self, search: Any, dictionary: Dictionary, words: dict[str, list[str]], nbest: NbestLists | None = None
    ) -> None:
        self.search, self.dictionary, self.nbest = search, dictionary, nbest
        # no eos in transcripts, nor what a model that learned nothing may say
        self.symbols_to_strip_from_output = {dictionary.bos(), dictionary.pad(), dictionary.eos()}
        self.transcripts = Transcripts(words, has_word_boundary="|" in dictionary.symbols)

    def generate(self, models: list[Any], sample: dict[str, Any], **options: Any) -> list[list[dict[str, Any]]]:
        """Decodes a batch: per utterance fairseq's hypotheses, best first."""
        start = time.perf_counter()
        hypotheses: list[list[dict[str, Any]]] = self.search.generate(models, sample, **options)
        self.transcripts.decode_seconds += time.perf_counter() - start
        self._keep(sample, hypotheses)
        return hypotheses

    def _keep(self, sample: dict[str, Any], hypotheses: list[list[dict[str, Any]]]) -> None:
        source, padding_mask = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
        num_samples = source.numel() if padding_mask is None else int((~padding_mask).sum())
        self.transcripts.audio_seconds += num_samples / SAMPLE_RATE
        for utterance, target, best_first in zip(sample["id"].tolist(), sample["target"], hypotheses, strict=True):
            reference = self._units(utils.strip_pad(target, self.dictionary.pad()), escape_unk=True)
            self.transcripts.add(Transcript(utterance, self._units(best_first[0]["tokens"]), reference))
            if self.nbest is not None:
                self.nbest.add(utterance, self._hypotheses(utterance, best_first[: self.nbest.size]))

    def _hypotheses(self, utterance: int, best_first: list[dict[str, Any]]) -> list[Hypothesis]:
        """Hypotheses as the n-best file has them; empty ones, ones with <unk> and repeated ones are of no use to training."""
        unknown = self.dictionary.unk()
        kept: dict[str, Hypothesis] = {}
        for hypothesis in best_first:
            units = self._units(hypothesis["tokens"])
            if units and units not in kept and not bool((hypothesis["tokens"] == unknown).any()):
                confidence = float(hypothesis["positional_scores"].exp().mean().clamp(max=1.0))
                kept[units] = Hypothesis(units, float(hypothesis["score"]), confidence)
        if not kept:
            logger.warning(
                "utterance %d has no hypothesis that training could use, so that its n-best file is refused there: remove it from "
                "manifest, labels and n-best file, or decode with a better model or a wider beam",
                utterance,
            )
        return list(kept.values())

    def _units(self, tokens: Tensor, escape_unk: bool = False) -> str:
        return str(self.dictionary.string(tokens.int().cpu(), None, escape_unk, self.symbols_to_strip_from_output))
