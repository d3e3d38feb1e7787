"""Which weights of a language model and of words decode best: a model's output computed once, decoded many times."""

from __future__ import annotations

import html
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from s3distill.analysis.plots import INK, PALETTE, new_figure, to_svg
from s3distill.analysis.report import STYLE, captioned
from s3distill.data.audio import read_audio
from s3distill.data.manifest import write_lines
from s3distill.data.manifest_lines import Manifest
from s3distill.data.pseudo_labels import batches_of
from s3distill.decoding.lexicon_lm import LexiconLmSearch
from s3distill.decoding.scoring import error_rates
from s3distill.encoder.speech_model import SpeechModel

_WEAKEST, _STRONGEST = 0.04, 0.75  # opacity of a cell, such that its figure can be read on it


@dataclass(frozen=True)
class Trial:
    """Error rates, percent, of a validation set decoded with these weights."""

    lm_weight: float
    word_score: float
    wer: float
    uer: float


@torch.inference_mode()
def compute_log_probs(
    model: SpeechModel, manifest: Manifest, batch_size: int = 8, progress: bool = True
) -> list[Tensor]:
    """Log-probabilities [T, V] float32 of each utterance of a manifest, in its order, on the CPU."""
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(manifest.entries)
    with tqdm(total=len(found), desc="model", unit=" utterances", disable=not progress) as bar:
        for batch in batches_of(manifest, batch_size):
            audio = [torch.from_numpy(read_audio(manifest.audio_path(index))) for index in batch]
            lengths = torch.tensor([len(samples) for samples in audio], device=device)
            out = model(pad_sequence(audio, batch_first=True).to(device), lengths)
            assert out.logits is not None
            log_probs = out.logits.float().log_softmax(-1).cpu()  # [B, T, V]
            valid = [slice(None)] * len(batch) if out.padding_mask is None else ~out.padding_mask.cpu()
            for index, frames, is_valid in zip(batch, log_probs, valid, strict=True):
                found[index] = frames[is_valid]
            bar.update(len(batch))
    return found


def sweep(
    log_probs: Sequence[Tensor],
    references: Sequence[str],
    search: LexiconLmSearch,
    words: Callable[[Sequence[str]], str],
    lm_weights: Sequence[float],
    word_scores: Sequence[float],
    progress: bool = True,
) -> list[Trial]:
    """Decodes every utterance with every pair of weights.

    Args:
        log_probs: see `compute_log_probs`.
        references: the words of each utterance.
        search: whose weights are varied.
        words: symbols -> words, where no lexicon says them.
        lm_weights, word_scores: the values to try.
    Returns:
        The trials, the best first: lowest word error rate, then unit error rate, then smallest weights.
    """
    trials = []
    pairs = list(itertools.product(lm_weights, word_scores))
    with tqdm(total=len(pairs) * len(log_probs), desc="decoder", unit=" utterances", disable=not progress) as bar:
        for lm_weight, word_score in pairs:
            weighted = search.weighted(lm_weight, word_score)
            hypotheses = []
            for frames in log_probs:
                best = weighted(frames[None], None)[0][0]
                symbols = [search.symbols[token] for token in best.tokens.tolist()]
                hypotheses.append(words(symbols) if best.words is None else " ".join(best.words))
                bar.update()
            rates = error_rates(references, hypotheses)
            trials.append(Trial(lm_weight, word_score, rates.wer, rates.uer))
    return sorted(trials, key=lambda t: (t.wer, t.uer, t.lm_weight, abs(t.word_score), t.word_score))


def write_trials(path: str | os.PathLike[str], trials: Sequence[Trial], what: str) -> None:
    """Writes the heat map and a table of all trials as one HTML page."""
    title = "Weights of the language model"
    caption = f"Word error rate, percent, of {html.escape(what)}: the lighter the better; framed, the best."
    columns = ("language model", "word score", "WER %", "UER %")
    head = "".join(f'<th scope="col">{text}</th>' for text in columns)
    rows = "".join(
        f"<tr><td>{t.lm_weight:g}</td><td>{t.word_score:g}</td><td>{t.wer:.2f}</td><td>{t.uer:.2f}</td></tr>"
        for t in trials
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    body = "\n".join([f"<h1>{title}</h1>", captioned(plot_trials(trials), caption), table])
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    write_lines(Path(path), [f'<!doctype html>\n<html lang="en"><head>{meta}</head><body>\n{body}\n</body></html>'])


def plot_trials(trials: Sequence[Trial]) -> str:
    """A cell per trial, the darker the more errors, the best one framed: an ``<svg>`` element.

    Args:
        trials: of `sweep`, the best first.
    """
    lm_weights, word_scores = (sorted({getattr(t, name) for t in trials}) for name in ("lm_weight", "word_score"))
    figure, axes = new_figure((2.2 + 0.7 * len(lm_weights), 1.4 + 0.45 * len(word_scores)))
    from matplotlib.patches import Rectangle

    low, high = min(t.wer for t in trials), max(t.wer for t in trials)
    for trial in trials:
        x, y = lm_weights.index(trial.lm_weight), word_scores.index(trial.word_score)
        share = (trial.wer - low) / (high - low) if high > low else 0.0
        opacity = _WEAKEST + (_STRONGEST - _WEAKEST) * share
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=PALETTE[0], alpha=opacity, linewidth=0))
        if trial == trials[0]:
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor=INK, linewidth=1.5))
        axes.text(x, y, f"{trial.wer:.1f}", ha="center", va="center", color=INK, fontsize=8)
    axes.set_xlim(-0.5, len(lm_weights) - 0.5)
    axes.set_ylim(-0.5, len(word_scores) - 0.5)
    axes.set_xticks(range(len(lm_weights)), [f"{value:g}" for value in lm_weights])
    axes.set_yticks(range(len(word_scores)), [f"{value:g}" for value in word_scores])
    axes.set_xlabel("weight of the language model")
    axes.set_ylabel("word score")
    best = trials[0]
    return to_svg(
        figure,
        f"Word error rate by weights. Best: {best.wer:.2f}% at language model {best.lm_weight:g}, word score {best.word_score:g}; "
        f"worst: {high:.2f}%.",
    )
