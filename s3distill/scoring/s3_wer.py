"""`s3_wer`: word and unit error rates of `fairseq-generate --task audio_ctc`, and the files of ``--results-path``."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import json
import logging
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data.data_utils import post_process
from fairseq.dataclass import FairseqDataclass
from fairseq.scoring import BaseScorer, register_scorer
from omegaconf import II

from s3distill.data.manifest import write_lines
from s3distill.data.nbest import ENDING, write_nbest
from s3distill.decoding.scoring import ErrorRates, error_rates
from s3distill.decoding.transcripts import Transcripts
from s3distill.scoring._nbest_lists import NbestLists

logger = logging.getLogger(__name__)


@dataclass
class S3WerConfig(FairseqDataclass):
    """Nothing to set: all is taken from the options of the run."""

    post_process: Optional[str] = II("common_eval.post_process")
    results_path: Optional[str] = II("common_eval.results_path")
    path: Optional[str] = II("common_eval.path")
    gen_subset: str = II("dataset.gen_subset")


@register_scorer("s3_wer", dataclass=S3WerConfig)
class S3WerScorer(BaseScorer):
    """WER against `.wrd` where that file lies beside the manifest, else against the labels joined to words; UER against the labels."""

    # fairseq builds a scorer from its config alone, so the generator of the run leaves its transcripts here
    run: Transcripts | None = None
    nbest: NbestLists | None = None  # lists that are kept, to be written beside the scores

    def __init__(self, cfg: S3WerConfig) -> None:
        super().__init__(cfg)
        if self.run is None:
            raise RuntimeError(
                "`--scoring s3_wer` scores what `--task audio_ctc` decodes; pass that task, or another --scoring"
            )
        self.transcripts = self.run

    def score(self) -> float:
        """WER, percent."""
        return self._score()[0].wer

    def result_string(self) -> str:
        """The line at the end of `fairseq-generate`; its last call in a run, so the result files are written here."""
        rates, texts = self._score()
        if self.cfg.results_path:
            self._write(Path(self.cfg.results_path), rates, texts)
        return f"{rates}; {self._speed()}"

    def _speed(self) -> str:
        """How long the audio took: in all and per second of it, model and decoder apart; and the memory at its peak."""
        run = self.transcripts
        rtf = run.decode_seconds / max(run.audio_seconds, 1e-9)
        parts = f"RTF {rtf:.4f}"
        if run.search_seconds:
            of_search = run.search_seconds / max(run.audio_seconds, 1e-9)
            parts += f": model {rtf - of_search:.4f}, decoder {of_search:.4f}"
        return f"decoded {run.audio_seconds:.1f} s of audio in {run.decode_seconds:.1f} s ({parts}), peak memory {_peak_memory()}"

    def _score(self) -> tuple[ErrorRates, dict[str, list[str]]]:
        """Error rates, and the texts behind them by the name of their file, in the manifest's order."""
        transcripts = self.transcripts.in_order()
        if len(transcripts) != len(self.ref):
            raise RuntimeError(
                f"{len(transcripts)} utterances were decoded, but {len(self.ref)} scored; decode each once per run"
            )
        words = self.transcripts.words.get(self.cfg.gen_subset)
        texts = {
            "hypo.units": [t.hypothesis for t in transcripts],
            "ref.units": [t.reference for t in transcripts],
            "hypo.word": [self._words(t.hypothesis) if t.words is None else t.words for t in transcripts],
            "ref.word": [words[t.utterance] if words else self._words(t.reference) for t in transcripts],
        }
        return error_rates(texts["ref.word"], texts["hypo.word"], texts["ref.units"], texts["hypo.units"]), texts

    def _words(self, units: str) -> str:
        pieces = "sentencepiece" if self.transcripts.has_pieces else "none"
        default = "letter" if self.transcripts.has_word_boundary else pieces
        return " ".join(post_process(units, self.cfg.post_process or default).split())

    def _write(self, folder: Path, rates: ErrorRates, texts: dict[str, list[str]]) -> None:
        """The files that fairseq's examples/speech_recognition/infer.py writes, and the scores as JSON."""
        ids = [t.utterance for t in self.transcripts.in_order()]
        model, subset = os.path.basename(str(self.cfg.path)), self.cfg.gen_subset
        for kind, lines in texts.items():
            # infer.py names a speaker, too, and has none: every line ends in "(None-utterance)"
            write_lines(
                folder / f"{kind}-{model}-{subset}.txt", (f"{t} (None-{i})" for t, i in zip(lines, ids, strict=True))
            )
        scores: dict[str, Any] = {
            **rates.to_dict(),
            "word_references": "wrd" if subset in self.transcripts.words else "labels",
            "decode_seconds": self.transcripts.decode_seconds,
            "audio_seconds": self.transcripts.audio_seconds,
            "search_seconds": self.transcripts.search_seconds,
        }
        write_lines(folder / f"scores-{subset}.json", [json.dumps(scores, indent=2)])
        if any(t.confidence is not None for t in self.transcripts.in_order()):
            write_lines(folder / f"{subset}.words.jsonl", _timed_lines(self.transcripts, subset, texts["hypo.word"]))
        if self.nbest is not None:
            write_nbest(folder / f"{subset}.{ENDING}", self.nbest.entries(subset))
        logger.info("%d transcripts and scores-%s.json written to %s", len(ids), subset, folder)


def _timed_lines(transcripts: Transcripts, subset: str, texts: list[str]) -> Iterator[str]:
    """A JSON object per utterance: its file, its text, how sure it is, and when each word was said."""
    files = transcripts.audio.get(subset)
    for transcript, text in zip(transcripts.in_order(), texts, strict=True):
        words = [
            {
                "word": w.word,
                "start_s": round(w.start_s, 3),
                "end_s": round(w.end_s, 3),
                "confidence": round(w.confidence, 4),
            }
            for w in transcript.times
        ]
        yield json.dumps(
            {
                "utterance": transcript.utterance,
                "audio": files[transcript.utterance] if files else None,
                "text": text,
                "confidence": None if transcript.confidence is None else round(transcript.confidence, 4),
                "words": words,
            },
            ensure_ascii=False,
        )


def _peak_memory() -> str:
    """Of this process, libraries included, and of the GPU where there is one."""
    unit = 2**10 if sys.platform == "linux" else 1  # bytes; getrusage counts in KiB on Linux
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        memory += f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU"
    return memory
