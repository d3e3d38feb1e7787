"""How a CTC model is decoded: the options of `audio_ctc`, and the search that they make."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from s3distill.decoding.ctc import CtcHypothesis, greedy_decode
from s3distill.decoding.lexicon_lm import LexiconLmSearch, LmOptions
from s3distill.decoding.prefix_beam import prefix_beam_search

DECODERS = ("greedy", "beam", "lexicon", "ngram")
BEAM_THRESHOLD = 50.0
_OPTIONS = ("decoder", "lexicon", "ngram_lm", "word_score", "beam_threshold", "symbol_threshold")
# log-probabilities [B, T, V] and padding mask [B, T] -> hypotheses per utterance, the best first
Search = Callable[[Tensor, Optional[Tensor]], list[list[CtcHypothesis]]]


@dataclass
class DecodingConfig(FairseqDataclass):
    """Options of `fairseq-generate` beside its own --beam, --nbest and --lm-weight, which mean here what they say."""

    decoder: ChoiceEnum(DECODERS) = field(  # type: ignore[valid-type]
        default="greedy",
        metadata={
            "help": "greedy: the best symbol of each frame; beam: prefix beam search over --beam prefixes; lexicon: words of --lexicon, "
            "with or without --ngram-lm; ngram: --ngram-lm over symbols. The last two need the extra [decode]"
        },
    )
    lexicon: Optional[str] = field(
        default=None, metadata={"help": "file with a line per spelling, WORD<TAB>W O R D |, for --decoder lexicon"}
    )
    ngram_lm: Optional[str] = field(
        default=None,
        metadata={
            "help": "KenLM's .arpa or .bin file, over words (--decoder lexicon) or symbols (ngram), weighed by --lm-weight; --lm-path "
            "is for fairseq's own language models"
        },
    )
    word_score: float = field(
        default=0.0, metadata={"help": "added for each word of the lexicon; above 0 makes more words"}
    )
    beam_threshold: float = field(
        default=BEAM_THRESHOLD,
        metadata={"help": "lexicon, ngram: hypotheses so much worse than the best one (nats) are dropped"},
    )
    symbol_threshold: Optional[float] = field(
        default=None,
        metadata={"help": "beam: symbols so much less probable than a frame's best one (nats) are left out, for speed"},
    )


def build_search(cfg: DecodingConfig, generation: Any, dictionary: Dictionary, blank: int) -> Search:
    """The search that the options ask for.

    Args:
        cfg: the task's options.
        generation: fairseq's generation options (``beam``, ``nbest``, ``lm_weight``).
        dictionary: symbols of the model's output.
        blank: index of the blank.
    Raises:
        ValueError: an option is out of range, is missing, or has no effect beside the others.
        RuntimeError: a package of the extra [decode] is missing.
    """
    decoder, beam, nbest, lm_weight = str(cfg.decoder), generation.beam, generation.nbest, generation.lm_weight
    _check(cfg, decoder, nbest, lm_weight)
    if decoder == "greedy":
        return lambda log_probs, padding_mask: [[h] for h in greedy_decode(log_probs, padding_mask, blank)]
    if nbest > beam:
        raise ValueError(f"--nbest must be at most --beam, but they are {nbest} and {beam}; pass more --beam")
    if decoder == "beam":
        return partial(prefix_beam_search, blank=blank, beam=beam, nbest=nbest, symbol_threshold=cfg.symbol_threshold)
    options = LmOptions(cfg.lexicon, cfg.ngram_lm, lm_weight, cfg.word_score, beam, cfg.beam_threshold)
    return partial(LexiconLmSearch(dictionary.symbols, blank, options), nbest=nbest)


def _check(cfg: DecodingConfig, decoder: str, nbest: int, lm_weight: float) -> None:
    """Refuses options that the decoder needs and lacks, and those that it would not look at."""
    for name, value, default, decoders in (
        ("lexicon", cfg.lexicon, None, ("lexicon",)),
        ("ngram-lm", cfg.ngram_lm, None, ("lexicon", "ngram")),
        ("lm-weight", lm_weight, 0.0, ("lexicon", "ngram")),
        ("word-score", cfg.word_score, 0.0, ("lexicon",)),
        ("beam-threshold", cfg.beam_threshold, BEAM_THRESHOLD, ("lexicon", "ngram")),
        ("symbol-threshold", cfg.symbol_threshold, None, ("beam",)),
        ("nbest", nbest, 1, ("beam", "lexicon", "ngram")),
    ):
        if value != default and decoder not in decoders:
            raise ValueError(
                f"--{name} {value} has no effect on --decoder {decoder}, it is for {' and '.join(decoders)}; leave it out, or pass "
                f"--decoder {decoders[0]}"
            )
    for name, value, needed_by in (("lexicon", cfg.lexicon, "lexicon"), ("ngram-lm", cfg.ngram_lm, "ngram")):
        if decoder == needed_by and value is None:
            raise ValueError(f"--decoder {decoder} needs --{name} FILE; pass it, or --decoder beam")
    if cfg.ngram_lm is not None and not lm_weight:
        raise ValueError(
            "--ngram-lm has no effect at --lm-weight 0, fairseq-generate's default; pass a weight such as 1 (s3distill tune-lm "
            "finds one), or leave --ngram-lm out"
        )


def refuse_decoders(cfg: DecodingConfig) -> None:
    """For models with a decoder, which fairseq's own beam search decodes: none of these options has an effect there."""
    for option in fields(DecodingConfig):
        value = getattr(cfg, option.name)
        if option.name in _OPTIONS and value != option.default and str(value) != option.default:
            raise ValueError(
                f"--{option.name.replace('_', '-')} {value} is for CTC models, but the model has a decoder, and fairseq's beam search "
                "decodes it; leave it out"
            )
