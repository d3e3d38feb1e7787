"""Pseudo-labels: a fine-tuned teacher decodes a manifest, batch by batch, into a journal."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from s3distill.data.audio import read_audio
from s3distill.data.label_text import LabelText, spelled_symbols
from s3distill.data.manifest import PathLike, read_dictionary
from s3distill.data.manifest_lines import Manifest
from s3distill.data.pseudo_label_journal import Decoded, Journal
from s3distill.data.pseudo_label_search import DecodeOptions, Search, search_of
from s3distill.decoding.ctc import CtcHypothesis
from s3distill.encoder.ctc_head import SPECIAL_SYMBOLS
from s3distill.encoder.speech_model import SpeechModel
from s3distill.masks.checksum import content_digest

logger = logging.getLogger(__name__)

DECIMALS = 4  # of scores and confidences that are written


class PseudoLabeller:
    """A teacher with its symbols, and the dictionary that its text is written in.

    Args:
        model: a CTC model of `s3distill.load`.
        teacher: what messages call it.
        teacher_dictionary: dictionary of a teacher whose checkpoint holds none.
        target_dictionary: dictionary of the labels; None: the teacher's.
    Raises:
        ValueError: the model has no CTC head, its dictionary is missing or does not fit, or nothing of it can be written in the
            target dictionary.
    """

    def __init__(
        self,
        model: SpeechModel,
        teacher: str,
        teacher_dictionary: PathLike | None = None,
        target_dictionary: PathLike | None = None,
    ) -> None:
        if model.head is None or model.pooled:
            kind = "classifies utterances" if model.pooled else "was pre-trained only"
            raise ValueError(f"the teacher must be a CTC model, but {teacher} {kind}; fine-tune it with CTC first")
        self.model = model
        self.symbols = _symbols(model, teacher, teacher_dictionary)
        spelled = spelled_symbols(self.symbols)
        self.text = LabelText(spelled if target_dictionary is None else list(read_dictionary(target_dictionary)))
        lost = [symbol for symbol in spelled if self.text.symbol(symbol) is None]
        if len(lost) == len(spelled):
            raise ValueError(
                f"{target_dictionary} must hold symbols of the teacher, but has none of {' '.join(lost[:12])}; give one of the same units"
            )
        if lost:
            logger.info("%s lacks %s: utterances that need them are left out", target_dictionary, " ".join(lost))

    def settings(self, manifest: Manifest, options: DecodeOptions) -> dict[str, Any]:
        """Everything that decides what is decoded, for the journal."""
        return {
            "teacher": content_digest(self.model.state_dict(), f"{self.model.normalize} {' '.join(self.symbols)}"),
            "manifest": hashlib.sha256(manifest.path.read_bytes()).hexdigest(),
            "dictionary": list(self.text.symbols),
            **options.settings(),
        }

    def decode(self, manifest: Manifest, journal: Journal, options: DecodeOptions, progress: bool = True) -> Decoded:
        """Decodes what the journal lacks of a shard, and returns all that the journal then holds, of every shard."""
        decoded, finished = journal.read()
        search = search_of(self.symbols, options)
        batches = batches_of(manifest, options.batch_size)
        todo = [b for b in range(options.shard - 1, len(batches), options.num_shards) if b not in finished]
        if finished and todo:
            logger.info("%d of %d batches are decoded already", len(finished), len(batches))
        total = sum(len(batches[b]) for b in todo)
        with (
            journal.append(options.shard, options.num_shards) as writer,
            tqdm(total=total, desc=manifest.path.name, unit=" utterances", disable=not progress) as bar,
        ):
            for b in todo:
                utterances = self._decode_batch(
                    [manifest.audio_path(index) for index in batches[b]], search, options.nbest
                )
                lines = [{"index": i, **utterance} for i, utterance in zip(batches[b], utterances, strict=True)]
                writer.write({"batch": b, "utterances": lines})
                decoded |= {line["index"]: line for line in lines}
                bar.update(len(batches[b]))
        return decoded

    @torch.inference_mode()
    def _decode_batch(self, paths: Sequence[Path], search: Search, nbest: int) -> list[dict[str, Any]]:
        """Audio files -> what the journal says of each."""
        device = next(self.model.parameters()).device
        audio = [torch.from_numpy(read_audio(path)) for path in paths]
        lengths = torch.tensor([len(samples) for samples in audio], device=device)
        waveforms = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True).to(device)  # [B, S]
        out = self.model(waveforms, lengths)
        assert out.logits is not None
        log_probs = out.logits.float().log_softmax(-1)  # [B, T, V]
        found = search(log_probs, out.padding_mask)
        log_probs = log_probs.cpu()
        return [self._utterance(row, hypotheses, nbest) for row, hypotheses in zip(log_probs, found, strict=True)]

    def _utterance(self, log_probs: Tensor, hypotheses: Sequence[CtcHypothesis], nbest: int) -> dict[str, Any]:
        """Hypotheses of one utterance, log_probs [T, V], in the target dictionary; those that become equal are joined."""
        joined: dict[str, tuple[float, float]] = {}
        for number, hypothesis in enumerate(hypotheses):
            units = self.text.normalise(self.symbols[token] for token in hypothesis.tokens.tolist())
            if units is None:
                if number == 0:
                    return {"unwritable": True, "hypotheses": []}
                continue
            line, confidence = " ".join(units), mean_posterior(log_probs, hypothesis)
            score, best = joined.get(line, (-math.inf, confidence))
            joined[line] = (_log_add(score, hypothesis.score), best)
        ranked = sorted(joined.items(), key=lambda item: -item[1][0])[:nbest]
        return {
            "hypotheses": [
                {"units": units, "score": round(score, DECIMALS), "confidence": round(confidence, DECIMALS)}
                for units, (score, confidence) in ranked
            ]
        }


def batches_of(manifest: Manifest, batch_size: int) -> list[list[int]]:
    """Indices of the utterances of each batch, longest first, so that little is padded and memory runs out early or never."""
    order = sorted(range(len(manifest.entries)), key=lambda index: (-manifest.entries[index][1], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def mean_posterior(log_probs: Tensor, hypothesis: CtcHypothesis) -> float:
    """Mean posterior of a hypothesis' symbols over their frames on its best path, log_probs [T, V]; 1 for an empty hypothesis.

    mean p_t(y_n)  over all n and start_n <= t < end_n:  blank frames, the easy ones, are left out
    """
    num_frames = hypothesis.ends - hypothesis.timesteps  # [N]
    if not int(num_frames.sum()):
        return 1.0
    symbols = hypothesis.tokens.repeat_interleave(num_frames)
    first = (num_frames.cumsum(0) - num_frames).repeat_interleave(num_frames)
    frames = hypothesis.timesteps.repeat_interleave(num_frames) + torch.arange(len(symbols)) - first
    return min(1.0, float(log_probs[frames, symbols].exp().mean()))


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); a may be -inf."""
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high


def _symbols(model: SpeechModel, teacher: str, dictionary: PathLike | None) -> list[str]:
    """Symbol of each output of the model, fairseq's special ones in front."""
    assert model.head is not None
    size = model.head.out_features
    if dictionary is None:
        if model.symbols is None:
            raise ValueError(
                f"the teacher's dictionary must be known, but {teacher} holds none; pass --teacher-dict with the one it was trained with"
            )
        return model.symbols
    symbols = [*SPECIAL_SYMBOLS, *read_dictionary(dictionary)]
    if model.symbols is not None and model.symbols[: len(symbols)] != symbols:
        raise ValueError(
            f"{dictionary} must be the teacher's dictionary, but {teacher} holds another; leave --teacher-dict out"
        )
    if not len(symbols) <= size < len(symbols) + 8:  # fairseq pads dictionaries to a multiple of 8
        raise ValueError(
            f"{dictionary} must have the symbols of the teacher's {size} outputs, 4 special ones included, but makes {len(symbols)}; give "
            "the dictionary that it was trained with"
        )
    return symbols + [f"madeupword{number:04d}" for number in range(size - len(symbols))]
