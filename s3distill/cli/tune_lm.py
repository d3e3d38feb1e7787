"""`s3distill tune-lm MANIFEST --model CKPT`: which --lm-weight and --word-score decode a validation set best."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import s3distill
from s3distill.analysis.lm_weights import Trial, compute_log_probs, sweep, write_trials
from s3distill.data.manifest import label_path, validate_for_training, write_lines
from s3distill.data.manifest_check import RECEPTIVE_FIELD
from s3distill.data.pseudo_label_files import read_reference
from s3distill.data.pseudo_label_search import BLANK
from s3distill.data.pseudo_labels import PseudoLabeller
from s3distill.decoding.lexicon_lm import LexiconLmSearch, LmOptions

LM_WEIGHTS, WORD_SCORES = "0.5,1,1.5,2,3", "-2,-1,0,1,2"
NUM_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST.tsv", help="validation set, with .wrd or .ltr beside it")
    parser.add_argument("--model", required=True, metavar="CKPT", help="fine-tuned CTC model")
    parser.add_argument("--lexicon", metavar="FILE", help="words and their spellings, for --decoder lexicon")
    parser.add_argument(
        "--ngram-lm", metavar="FILE", help="KenLM's .arpa or .bin: of words, without --lexicon of symbols"
    )
    parser.add_argument(
        "--lm-weights", type=_numbers, metavar="A,B,...", help=f"values to try ({LM_WEIGHTS}; 0 without --ngram-lm)"
    )
    parser.add_argument(
        "--word-scores", type=_numbers, metavar="A,B,...", help=f"values to try ({WORD_SCORES}; 0 without --lexicon)"
    )
    parser.add_argument("--beam", type=int, default=50, help="hypotheses that stay after each frame (%(default)s)")
    parser.add_argument("--beam-threshold", type=float, default=50.0, help="as in decoding (%(default)s)")
    parser.add_argument("--dict", metavar="FILE", help="dictionary of a model whose checkpoint holds none")
    parser.add_argument(
        "--labels", default=None, metavar="wrd|ltr|PATH", help="references (.wrd where it is, else .ltr)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="utterances at a time in the model (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of the model, e.g. cuda (%(default)s)")
    parser.add_argument("-o", "--output", metavar="DIR", help="write tune-lm.json and tune-lm.html there")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    if args.output is not None and not Path(args.output).is_dir():
        raise ValueError(f"the folder of the results must exist, but {args.output} does not; make it first")
    lm_weights = args.lm_weights or _numbers(LM_WEIGHTS if args.ngram_lm else "0")
    word_scores = args.word_scores or _numbers(WORD_SCORES if args.lexicon else "0")
    manifest = validate_for_training(args.manifest, min_samples=RECEPTIVE_FIELD)
    model = PseudoLabeller(s3distill.load(args.model), args.model, args.dict)
    options = LmOptions(args.lexicon, args.ngram_lm, max(lm_weights), max(word_scores), args.beam, args.beam_threshold)
    search = LexiconLmSearch(model.symbols, BLANK, options)
    search.weighted(min(lm_weights), min(word_scores))  # refuses what is out of range before anything is computed
    labels = label_path(args.manifest, args.labels or "wrd")
    if args.labels is None and not labels.is_file():
        labels = label_path(args.manifest, "ltr")
    references = read_reference(labels, manifest, model.text)
    log_probs = compute_log_probs(model.model.to(args.device), manifest, args.batch_size, not args.no_progress)
    trials = sweep(
        log_probs, references, search, model.text.words, lm_weights, word_scores, progress=not args.no_progress
    )
    _report(trials, args)
    return 0


def _report(trials: list[Trial], args: argparse.Namespace) -> None:
    print(f"{'lm weight':>10}{'word score':>12}{'WER %':>9}{'UER %':>9}")
    for trial in trials[:NUM_SHOWN]:
        print(f"{trial.lm_weight:>10g}{trial.word_score:>12g}{trial.wer:>9.2f}{trial.uer:>9.2f}")
    if len(trials) > NUM_SHOWN:
        print(f"and {len(trials) - NUM_SHOWN} more, up to {trials[-1].wer:.2f}%")
    best = trials[0]
    line = ["--decoder", "lexicon" if args.lexicon else "ngram", "--beam", f"{args.beam}"]
    if args.lexicon:
        line += ["--lexicon", args.lexicon]
    if args.ngram_lm and best.lm_weight:
        line += ["--ngram-lm", args.ngram_lm, "--lm-weight", f"{best.lm_weight:g}"]
    if best.word_score:
        line += [f"--word-score={best.word_score:g}"]
    print(f"best, for fairseq-generate --task audio_ctc:\n  {' '.join(line)}")
    if args.output:
        folder, what = Path(args.output), f"{args.manifest} by {args.model}"
        write_lines(folder / "tune-lm.json", [json.dumps([asdict(trial) for trial in trials], indent=2)])
        write_trials(folder / "tune-lm.html", trials, what)
        print(f"wrote {folder / 'tune-lm.json'} and {folder / 'tune-lm.html'}")


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas between them, such as 0.5,1,2, but is {text!r}"
        ) from error
    if not all(math.isfinite(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"must be finite numbers, but is {text!r}")
    return sorted(set(numbers))
