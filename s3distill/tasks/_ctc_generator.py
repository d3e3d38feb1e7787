"""What `fairseq-generate` calls for each batch of a CTC model: the model, the search, and what is kept of the results."""

import logging
import time
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.data import Dictionary
from torch import Tensor, nn

from s3distill.data.nbest import Hypothesis
from s3distill.data.pseudo_labels import mean_posterior
from s3distill.decoding.ctc import CtcHypothesis, average_log_probs
from s3distill.decoding.transcripts import Transcript, Transcripts
from s3distill.decoding.words import TimedWord, part_of, split_words, word_boundary
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.model import SpeechEncoder
from s3distill.scoring._nbest_lists import NbestLists
from s3distill.tasks._decoding import Search

logger = logging.getLogger(__name__)


class CtcGenerator:
    """Decodes batches of CTC models, one or an ensemble; keeps the transcripts for `s3_wer`.

    Args:
        dictionary: symbols of the model's output.
        blank: index of the blank.
        search: log-probabilities to hypotheses.
        words, audio: see `Transcripts`.
        nbest: takes the hypotheses of each utterance, or None.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        blank: int,
        search: Search,
        words: dict[str, list[str]],
        audio: dict[str, list[str]],
        nbest: Optional[NbestLists] = None,
    ) -> None:
        self.dictionary, self.search, self.nbest = dictionary, search, nbest
        self.symbols_to_strip_from_output = {blank, dictionary.pad(), dictionary.eos()}
        self.boundary = word_boundary(dictionary.symbols)
        self.transcripts = Transcripts(words, has_word_boundary="|" in dictionary.symbols, audio=audio)
        self.transcripts.has_pieces = self.boundary not in ("", "|")
        self.frame_s: Optional[float] = None

    @torch.no_grad()
    def generate(self, models: list[Any], sample: dict[str, Any], **_: Any) -> list[list[dict[str, Any]]]:
        """Decodes a batch.

        Returns:
            Per utterance its hypotheses, the best first: ``tokens`` [N], ``score`` and ``positional_scores`` [N] (natural
            logarithm), ``alignment`` [N, 2] (frame, position of the symbol that begins there).
        """
        start = time.perf_counter()
        outputs = [_frames(model, sample["net_input"]) for model in models]
        log_probs, padding_mask = average_log_probs([p for p, _ in outputs]).cpu(), outputs[0][1]
        searching = time.perf_counter()
        hypotheses = self.search(log_probs, padding_mask)
        self.transcripts.decode_seconds += time.perf_counter() - start
        self.transcripts.search_seconds += time.perf_counter() - searching
        if self.frame_s is None:
            self.frame_s = _samples_per_frame(models[0]) / SAMPLE_RATE
        self._keep(sample, hypotheses, log_probs)
        return [[_to_fairseq(h) for h in best_first] for best_first in hypotheses]

    def _keep(self, sample: dict[str, Any], hypotheses: list[list[CtcHypothesis]], log_probs: Tensor) -> None:
        source, padding_mask = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
        num_samples = source.numel() if padding_mask is None else int((~padding_mask).sum())
        self.transcripts.audio_seconds += num_samples / SAMPLE_RATE
        for utterance, target, best_first, frames in zip(
            sample["id"].tolist(), sample["target"], hypotheses, log_probs, strict=True
        ):
            reference = utils.strip_pad(target, self.dictionary.pad())
            best = best_first[0]
            transcript = Transcript(
                utterance,
                self._units(best.tokens),
                self._units(reference, escape_unk=True),
                words=None if best.words is None else " ".join(best.words),
                confidence=mean_posterior(frames, best),
                times=tuple(self._timed_words(best, frames)),
            )
            self.transcripts.add(transcript)
            if self.nbest is not None:
                self.nbest.add(utterance, self._hypotheses(utterance, best_first, frames))

    def _timed_words(self, hypothesis: CtcHypothesis, frames: Tensor) -> list[TimedWord]:
        """Words of one utterance, spelled by its symbols or as the lexicon has them; frames [T, V] are log-probabilities."""
        assert self.frame_s is not None
        tokens = hypothesis.tokens.tolist()
        kept = [i for i, token in enumerate(tokens) if token not in self.symbols_to_strip_from_output]
        symbols = [self.dictionary[tokens[i]] for i in kept]
        words = list(split_words(symbols, self.boundary))
        said = hypothesis.words if hypothesis.words and len(hypothesis.words) == len(words) else None
        timed = []
        for number, (spelled, where) in enumerate(words):
            part = part_of(hypothesis, kept[where])
            start, end = float(part.timesteps[0]) * self.frame_s, float(part.ends[-1]) * self.frame_s
            timed.append(TimedWord(said[number] if said else spelled, start, end, mean_posterior(frames, part)))
        return timed

    def _hypotheses(self, utterance: int, best_first: list[CtcHypothesis], frames: Tensor) -> list[Hypothesis]:
        """Hypotheses as the n-best file has them; empty ones, ones with <unk> and repeated ones are of no use to training."""
        kept: dict[str, Hypothesis] = {}
        for hypothesis in best_first:
            units = self._units(hypothesis.tokens)
            if units and units not in kept and not bool((hypothesis.tokens == self.dictionary.unk()).any()):
                kept[units] = Hypothesis(units, hypothesis.score, mean_posterior(frames, hypothesis))
        if not kept:
            logger.warning(
                "utterance %d has no hypothesis that training could use: its n-best line is empty", utterance
            )
        return list(kept.values())

    def _units(self, tokens: Tensor, escape_unk: bool = False) -> str:
        return str(self.dictionary.string(tokens.int().cpu(), None, escape_unk, self.symbols_to_strip_from_output))


def _frames(model: Any, net_input: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [B, T, V] of a fairseq CTC model and its padding mask [B, T]."""
    output = model(**net_input)
    log_probs = model.get_normalized_probs(output, log_probs=True)  # [T, B, V]
    # read behind get_normalized_probs, in which some models still correct the mask's length
    return log_probs.transpose(0, 1), output["padding_mask"]


def _samples_per_frame(model: nn.Module) -> int:
    """Audio samples from one output frame to the next: the strides of the waveform extractor, ours or fairseq's."""
    for module in model.modules():
        if isinstance(module, SpeechEncoder):
            return module.config.frame_stride
        extractor = getattr(module, "feature_extractor", None)
        if isinstance(extractor, nn.Module):
            stride = 1
            for conv in (m for m in extractor.modules() if isinstance(m, nn.Conv1d)):
                stride *= conv.stride[0]
            return stride
    raise RuntimeError(
        f"word times need the frame rate of the model, but {type(model).__name__} has no `feature_extractor` of convolutions"
    )


def _to_fairseq(hypothesis: CtcHypothesis) -> dict[str, Any]:
    positions = torch.arange(len(hypothesis.tokens))
    return {
        "tokens": hypothesis.tokens,
        "score": hypothesis.score,
        "positional_scores": hypothesis.positional_scores.clone(),  # fairseq changes it in place
        "alignment": torch.stack([hypothesis.timesteps, positions], dim=1),
    }
