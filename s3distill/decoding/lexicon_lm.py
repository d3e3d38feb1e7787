"""Beam search with a lexicon, an n-gram language model, or both: flashlight-text's decoders, and KenLM."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from s3distill.decoding.alignment import best_paths
from s3distill.decoding.ctc import CtcHypothesis, check_log_probs, pack_valid_frames
from s3distill.decoding.lexicon import read_lexicon
from s3distill.decoding.words import LETTER_BOUNDARY

logger = logging.getLogger(__name__)

UNKNOWN = "<unk>"
MAX_NAMED = 8
PIP_LINE = "pip install 's3distill[decode]' (flashlight-text and kenlm)"


@dataclass(frozen=True)
class LmOptions:
    """What the search adds up: log P(path) + lm_weight * log10 P(words) + word_score * number of words.

    Attributes:
        lexicon: file of words and their spellings; None: any symbol may follow any other.
        ngram_lm: KenLM's ``.arpa`` or ``.bin`` file: over words with a lexicon, over symbols without one. None: no model.
        lm_weight: of its log10 probability, as in fairseq's and flashlight's published commands.
        word_score: of each word of the lexicon; above 0 makes more words.
        beam: hypotheses that stay after each frame.
        beam_threshold: those that are this much worse than the best one (nats) are dropped, too.
    """

    lexicon: str | os.PathLike[str] | None = None
    ngram_lm: str | os.PathLike[str] | None = None
    lm_weight: float = 0.0
    word_score: float = 0.0
    beam: int = 50
    beam_threshold: float = 50.0

    def __post_init__(self) -> None:
        if self.lexicon is None and self.ngram_lm is None:
            raise ValueError(
                "this search needs `lexicon`, `ngram_lm` or both, but has neither; prefix_beam_search needs none"
            )
        for name, value in (("beam", self.beam), ("beam_threshold", self.beam_threshold)):
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value}")
        if not (math.isfinite(self.lm_weight) and self.lm_weight >= 0 and math.isfinite(self.word_score)):
            raise ValueError(
                f"`lm_weight` must be a number of at least 0 and `word_score` a number, but are {self.lm_weight} and {self.word_score}"
            )
        if self.ngram_lm is None and self.lm_weight:
            raise ValueError(
                f"`lm_weight` is {self.lm_weight}, but there is no `ngram_lm` to weigh; pass one, or lm_weight 0"
            )
        if self.lexicon is None and self.word_score:
            raise ValueError(f"`word_score` is {self.word_score}, but words are a lexicon's; pass one, or word_score 0")


class LexiconLmSearch:
    """Decodes with a lexicon and/or an n-gram language model; files are read once, here.

    Args:
        symbols: what the model's outputs are, in their order; special ones (``<s>``, ``<pad>``) are never said.
        blank: index of the blank symbol.
        options: what to decode with.
    Raises:
        RuntimeError: flashlight-text or kenlm is not installed.
        ValueError: a file cannot be read, or does not know the symbols.
    """

    def __init__(self, symbols: Sequence[str], blank: int, options: LmOptions) -> None:
        self.symbols, self.blank, self.options = list(symbols), blank, options
        self._flashlight = _require("flashlight.lib.text.decoder")
        self._silenced = [i for i, s in enumerate(symbols) if i != blank and _is_special(s)]
        spoken = {s: i for i, s in enumerate(symbols) if not _is_special(s)}
        lexicon = None if options.lexicon is None else read_lexicon(options.lexicon, spoken)
        self._words = None if lexicon is None else list(lexicon)
        if lexicon is None:
            self._model = self._language_model(list(symbols), what="symbols of the model", required=list(spoken))
        else:
            self._model = self._language_model([*lexicon, UNKNOWN], what="words of the lexicon")
        # flashlight's silence, which may stand between words, is |; without such a symbol the blank does that anyway
        self._silence = spoken.get(LETTER_BOUNDARY, blank)
        self._trie = None if lexicon is None else self._spell(lexicon)
        self._decoder = self._build()

    def weighted(self, lm_weight: float, word_score: float) -> LexiconLmSearch:
        """The same search with other weights; no file is read again."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, lm_weight=lm_weight, word_score=word_score)
        other._decoder = other._build()
        return other

    def __call__(self, log_probs: Tensor, padding_mask: Tensor | None, nbest: int = 1) -> list[list[CtcHypothesis]]:
        """Decodes a batch, utterance by utterance, on the CPU.

        Args:
            log_probs: [B, T, V]; padding_mask: [B, T], True = padding, or None; nbest: hypotheses per utterance.
        Returns:
            Per utterance up to ``nbest`` hypotheses, the best first; ``score`` is that of the search, ``words`` those of the lexicon.
        Raises:
            ValueError: shapes do not fit, or a valid frame holds NaN.
        """
        check_log_probs(log_probs, padding_mask, self.blank)
        if log_probs.shape[2] != len(self.symbols):
            raise ValueError(f"`log_probs` must have {len(self.symbols)} symbols, but have {log_probs.shape[2]}")
        frames, lengths, places = pack_valid_frames(log_probs, padding_mask)
        found = [self._search(frames[row, : lengths[row]], nbest) for row in range(len(frames))]
        owners = [row for row, results in enumerate(found) for _ in results]
        results = [result for of_row in found for result in of_row]
        paths = best_paths(frames, lengths, [result.tokens for result in results], owners, self.blank)
        hypotheses: list[list[CtcHypothesis]] = [[] for _ in found]
        for row, result, path in zip(owners, results, paths, strict=True):
            starts, ends = places[row][path.starts], places[row][path.ends - 1] + 1
            hypotheses[row].append(
                CtcHypothesis(result.tokens, result.score, path.scores, starts, ends, words=result.words)
            )
        return hypotheses

    def _search(self, frames: Tensor, nbest: int) -> list[_Result]:
        """[T, V] -> the best results, different ones."""
        if not len(frames):
            return [_Result(torch.zeros(0, dtype=torch.int64), 0.0, () if self._words is not None else None)]
        emissions = frames.float()
        emissions[:, self._silenced] = -math.inf
        emissions = emissions.contiguous()
        results: dict[tuple[tuple[int, ...], tuple[str, ...] | None], _Result] = {}
        for result in self._decoder.decode(emissions.data_ptr(), *emissions.shape):
            # one token stands in front of the first frame, one behind the last
            path, word_ends = result.tokens[1:-1], result.words[1:-1]
            words = None
            if self._words is not None:
                path = self._without_unfinished(path, word_ends)
                words = tuple(self._words[i] for i in word_ends if i >= 0)
            tokens = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != self.blank)
            key = (tokens, words)
            if math.isfinite(result.score) and key not in results:
                results[key] = _Result(torch.tensor(tokens, dtype=torch.int64), result.score, words)
            if len(results) == nbest:
                break
        return list(results.values())

    def _without_unfinished(self, path: list[int], word_ends: list[int]) -> list[int]:
        """A path without the letters of a word that the utterance broke off, or the search had to."""
        behind = 1 + max((frame for frame, word in enumerate(word_ends) if word >= 0), default=-1)
        last = path[behind - 1] if behind else self.blank
        rest = set(path[behind:]) - {self.blank, self._silence, last}
        return path[:behind] if rest else path

    def _spell(self, lexicon: dict[str, list[list[int]]]) -> Any:
        """flashlight's tree of the spellings; on the way to a word the language model's best score for what may come counts."""
        start = self._model.start(False)
        trie = self._flashlight.Trie(len(self.symbols), self._silence)
        for index, spellings in enumerate(lexicon.values()):
            _, score = self._model.score(start, index)
            for spelling in spellings:
                trie.insert(spelling, index, score)
        trie.smear(self._flashlight.SmearingMode.MAX)
        return trie

    def _build(self) -> Any:
        kit, options = self._flashlight, self.options
        shared = dict(
            beam_size=options.beam,
            beam_size_token=len(self.symbols),
            beam_threshold=options.beam_threshold,
            lm_weight=options.lm_weight,
            log_add=False,
            criterion_type=kit.CriterionType.CTC,
        )
        if self._words is None:
            settings = kit.LexiconFreeDecoderOptions(**shared, sil_score=0.0)
            # the search takes silence as said before the first frame, so that a | there would not count for the language model
            return kit.LexiconFreeDecoder(settings, self._model, self.blank, self.blank, [])
        settings = kit.LexiconDecoderOptions(
            **shared, word_score=options.word_score, unk_score=-math.inf, sil_score=0.0
        )
        unknown = len(self._words)
        return kit.LexiconDecoder(settings, self._trie, self._model, self._silence, self.blank, unknown, [], False)

    def _language_model(self, entries: list[str], what: str, required: list[str] | None = None) -> Any:
        """flashlight's language model over entries, index = position; with ``required``, each of those must be known."""
        path = self.options.ngram_lm
        if path is None:
            return self._flashlight.ZeroLM()
        known = _known_words(path, required or entries)
        missing = [entry for entry in required or entries if entry not in known and entry != UNKNOWN]
        if missing and (required or not known - {UNKNOWN}):
            named = " ".join(missing[:MAX_NAMED]) + (" ..." if len(missing) > MAX_NAMED else "")
            raise ValueError(
                f"the language model {path} must know the {what}, but knows none of {named}; "
                "a model over words needs a lexicon, one over symbols none; mind upper and lower case"
            )
        if missing:
            logger.warning("%d of the %d %s are unknown to %s", len(missing), len(entries) - 1, what, path)
        dictionary = _require("flashlight.lib.text.dictionary").Dictionary(entries)
        return _require("flashlight.lib.text.decoder.kenlm").KenLM(os.fspath(path), dictionary)


@dataclass(frozen=True)
class _Result:
    tokens: Tensor
    score: float
    words: tuple[str, ...] | None


def _is_special(symbol: str) -> bool:
    """fairseq's own symbols, and those with which it fills a dictionary up to a multiple of 8."""
    return symbol in ("<s>", "<pad>", "</s>", UNKNOWN) or symbol.startswith("madeupword")


def _known_words(path: str | os.PathLike[str], entries: list[str]) -> set[str]:
    if not Path(path).is_file():
        raise ValueError(f"the language model must be a file, but {path} is none")
    try:
        kenlm = _require("kenlm")
        config = kenlm.Config()
        config.show_progress = False  # flashlight reads the file again, and shows its own
        model = kenlm.Model(os.fspath(path), config)
    except (OSError, RuntimeError, ValueError) as error:  # kenlm's own messages may hold bytes of the file, no UTF-8
        raise ValueError(
            f"the language model must be an .arpa file or KenLM's own binary, but {path} is not: {str(error).splitlines()[0]}"
        ) from error
    return {entry for entry in entries if entry in model}


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"decoding with a lexicon or a language model needs {name.partition('.')[0]}, which does not load ({error}); run: "
            f"{PIP_LINE}"
        ) from error
