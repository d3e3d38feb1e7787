"""What decoding costs: the model, our prefix beam search and flashlight's lexicon-free one, over the same utterances.

    python benchmarks/decode.py --model CKPT --manifest test.tsv [--utterances 100] [--beam 50] [--json decode.json] [--check]
    python benchmarks/decode.py --small    # made-up log-probabilities, in seconds

Everything is measured in one run, in turns, and the least of the repeats counts. The searches get what a batch of `fairseq-generate`
holds: ``--batch-size`` utterances, the longest first. Flashlight goes through them one by one, with every symbol, no threshold and
log_add, which sums over paths as ours does; without flashlight-text its row is missing.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from timing import least_seconds
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import s3distill
from s3distill.data.audio import read_audio
from s3distill.data.manifest import read_manifest
from s3distill.data.pseudo_labels import batches_of
from s3distill.decoding.ctc import greedy_decode
from s3distill.decoding.prefix_beam import prefix_beam_search
from s3distill.encoder.config import SAMPLE_RATE

BLANK = 0
LEAST_SPEED = 20.0  # model and beam together, audio seconds per second
SYMBOL_THRESHOLD = 12.0  # nats
TOLERANCE = 1e-3  # nats, of log-probabilities in float32


@dataclass
class Batch:
    """Waveforms [B, S] with their lengths, where there is a model; log-probabilities [B, T, V] and what is padding, [B, T]."""

    log_probs: Tensor
    padding_mask: Tensor
    waveforms: Tensor | None = None
    lengths: Tensor | None = None


@dataclass
class Row:
    """One line of the table. ``speed`` is audio seconds per second; ``limit`` the least that it may be."""

    form: str
    seconds: float
    speed: float
    limit: float | None = None
    passed: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.passed = None if self.limit is None else self.speed >= self.limit

    def line(self) -> str:
        required = "" if self.limit is None else f">= {self.limit:g}x  {'PASS' if self.passed else 'FAIL'}"
        return f"  {self.form:<40}{self.seconds:>10.3f} s{self.speed:>9.1f}x  {required}".rstrip()


@torch.inference_mode()
def batches_of_speech(
    model: Any, path: Path, num_utterances: int, batch_size: int, device: str
) -> tuple[list[Batch], float]:
    """Batches of a manifest's first utterances with what the model makes of them, and their seconds."""
    manifest = read_manifest(path)
    if len(manifest.entries) < num_utterances:
        raise ValueError(
            f"--utterances must be at most {len(manifest.entries)}, all of {path}, but is {num_utterances}"
        )
    batches, num_samples = [], 0
    longest_first = batches_of(manifest, len(manifest.entries))[0]
    chosen = [i for i in longest_first if i < num_utterances]
    for start in range(0, num_utterances, batch_size):
        audio = [torch.from_numpy(read_audio(manifest.audio_path(i))) for i in chosen[start : start + batch_size]]
        lengths = torch.tensor([len(samples) for samples in audio], device=device)
        waveforms = pad_sequence(audio, batch_first=True).to(device)
        out = model(waveforms, lengths)
        log_probs = out.logits.float().log_softmax(-1).cpu()
        mask = (
            torch.zeros(log_probs.shape[:2], dtype=torch.bool) if out.padding_mask is None else out.padding_mask.cpu()
        )
        batches.append(Batch(log_probs, mask, waveforms, lengths))
        num_samples += int(lengths.sum())
    return batches, num_samples / SAMPLE_RATE


def made_up_batches(num_utterances: int, batch_size: int) -> tuple[list[Batch], float]:
    """Log-probabilities with a peak per frame, the blank in two of three, as a trained model has them; 50 frames a second."""
    torch.manual_seed(0)
    batches, num_frames = [], 0
    for start in range(0, num_utterances, batch_size):
        lengths = torch.randint(60, 120, (min(batch_size, num_utterances - start),)).sort(descending=True).values
        shape = (len(lengths), int(lengths[0]))
        peaks = torch.where(torch.rand(shape) < 2 / 3, BLANK, torch.randint(1, 28, shape))
        logits = torch.randn(*shape, 28) + 6 * F.one_hot(peaks, 28)
        batches.append(Batch(logits.log_softmax(-1), torch.arange(shape[1]) >= lengths[:, None]))
        num_frames += int(lengths.sum())
    return batches, num_frames / 50


@torch.inference_mode()
def run_model(model: Any, batches: list[Batch]) -> None:
    for batch in batches:
        out = model(batch.waveforms, batch.lengths)
        out.logits.float().log_softmax(-1).cpu()


def search_ours(batches: list[Batch], beam: int, threshold: float | None = None) -> list[Tensor]:
    """Symbols of each utterance."""
    return [
        hypotheses[0].tokens
        for batch in batches
        for hypotheses in prefix_beam_search(batch.log_probs, batch.padding_mask, BLANK, beam, 1, threshold)
    ]


def search_greedily(batches: list[Batch]) -> None:
    for batch in batches:
        greedy_decode(batch.log_probs, batch.padding_mask, BLANK)


def flashlight_search(num_symbols: int, beam: int) -> Callable[[list[Batch]], list[Tensor]] | None:
    try:
        from flashlight.lib.text import decoder as kit
    except ImportError:
        return None
    options = kit.LexiconFreeDecoderOptions(
        beam_size=beam,
        beam_size_token=num_symbols,
        beam_threshold=1e9,
        lm_weight=0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=kit.CriterionType.CTC,
    )
    decoder = kit.LexiconFreeDecoder(options, kit.ZeroLM(), BLANK, BLANK, [])

    def search(batches: list[Batch]) -> list[Tensor]:
        found = []
        for batch in batches:
            for frames, is_padding in zip(batch.log_probs, batch.padding_mask, strict=True):
                valid = frames[~is_padding].contiguous()
                path = decoder.decode(valid.data_ptr(), *valid.shape)[0].tokens[1:-1]
                found.append(torch.tensor([s for s, _ in itertools.groupby(path) if s != BLANK], dtype=torch.int64))
        return found

    return search


def log_probabilities(batches: list[Batch], texts: list[Tensor]) -> Tensor:
    """Of each text over all of its paths, [N]."""
    found, rest = [], iter(texts)
    for batch in batches:
        for frames, is_padding in zip(batch.log_probs, batch.padding_mask, strict=True):
            valid, text = frames[~is_padding].double(), next(rest)
            found.append(-F.ctc_loss(valid[:, None], text[None], [len(valid)], [len(text)], BLANK, reduction="sum"))
    return torch.stack(found)


def measure(settings: timing.Settings, options: Any) -> dict[str, Any]:
    model, count = None, 16 if settings.small else options.utterances
    if settings.small:
        batches, audio_s = made_up_batches(count, options.batch_size)
    else:
        model = s3distill.load(options.model, settings.device)
        batches, audio_s = batches_of_speech(model, options.manifest, count, options.batch_size, settings.device)
    ours, pruned = f"prefix beam search, beam {options.beam}", f"the same, symbols within {SYMBOL_THRESHOLD:g} nats"
    runs: dict[str, Callable[[], Any]] = {} if model is None else {"model": lambda: run_model(model, batches)}
    runs["greedy"] = lambda: search_greedily(batches)
    runs[ours] = lambda: search_ours(batches, options.beam)
    runs[pruned] = lambda: search_ours(batches, options.beam, SYMBOL_THRESHOLD)
    theirs, name = (
        flashlight_search(batches[0].log_probs.shape[2], options.beam),
        f"flashlight lexicon-free, beam {options.beam}",
    )
    if theirs is not None:
        runs[name] = functools.partial(theirs, batches)
    section = f"{count} utterances, {audio_s:.1f} s"
    least = least_seconds(section, runs, settings)
    rows = [Row(form, seconds, audio_s / seconds) for form, seconds in least.items()]
    if model is not None:
        together = least["model"] + least[ours]
        rows.append(Row(f"model and {ours}", together, audio_s / together, LEAST_SPEED))
    texts, checks = search_ours(batches, options.beam), {}
    if theirs is not None:
        gains = log_probabilities(batches, texts) - log_probabilities(batches, theirs(batches))
        checks["texts at least as probable as flashlight's"] = bool((gains >= -TOLERANCE).all())
    same = [a.equal(b) for a, b in zip(texts, search_ours(batches, options.beam, SYMBOL_THRESHOLD), strict=True)]
    checks["the threshold changes no text"] = all(same)
    return {"section": section, "rows": rows, "checks": checks}


def main() -> int:
    parser = timing.parser((__doc__ or "").splitlines()[0], repeats="rounds, of which the least counts")
    parser.add_argument("--model", help="fine-tuned CTC model")
    parser.add_argument("--manifest", type=Path, help="audio to decode")
    parser.add_argument("--utterances", type=int, default=100, help="of the manifest (%(default)s)")
    parser.add_argument("--beam", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    options = parser.parse_args()
    if not options.small and not (options.model and options.manifest):
        parser.error("--model and --manifest say what is decoded; or pass --small")
    settings = timing.Settings(
        options.device, "float32", options.threads, options.clock, options.repeats, options.small
    )
    torch.set_num_threads(settings.threads)
    found = measure(settings, options)
    print(f"\n{found['section']}, batches of {options.batch_size}")
    for row in found["rows"]:
        print(row.line())
    for name, same in found["checks"].items():
        print(f"  {name:<56} {'PASS' if same else 'FAIL'}")
    values = {"environment": timing.environment(settings), "beam": options.beam, "batch_size": options.batch_size}
    values |= {"rows": [asdict(row) for row in found["rows"]], "checks": found["checks"]}
    timing.write_json(options.json, values)
    passed = all(found["checks"].values()) and not any(row.passed is False for row in found["rows"])
    return int(options.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
