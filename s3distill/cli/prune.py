"""`s3distill prune`: a gated student's checkpoint -> a compact one, checked on audio before it is written."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3distill import compat
from s3distill.analysis.measure import measure_encoders
from s3distill.cli.masks_bake import fairseq_dictionary
from s3distill.data.audio import read_audio
from s3distill.data.manifest import read_manifest
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import options_from_config
from s3distill.encoder.speech_model import normalize_waveforms
from s3distill.gates import GateCounts, LatencyTable, count_macs_per_second, count_parameters
from s3distill.masks.options import MaskOptions
from s3distill.masks.state import baked
from s3distill.pruning.compact import CompactStudent, prune_student
from s3distill.pruning.width import cut_heads

RTF_REPEATS = 5
MAX_SECONDS = 10  # of each utterance in the check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="student that was trained with gates (stage 1)")
    parser.add_argument("output", help="compact checkpoint to write")
    parser.add_argument(
        "--audio", help="manifest (.tsv) or audio file for the check; default: the data of the run that trained it"
    )
    parser.add_argument("--utterances", type=int, default=4, help="utterances of the manifest to check on (default 4)")


def run(args: argparse.Namespace) -> int:
    state = compat.load_checkpoint(args.checkpoint)
    student = parse_checkpoint(state, args.checkpoint)
    if student.scores:
        print(
            f"the masks of {len(student.scores)} modules are multiplied into the weights: a cut matrix has no mask of its density"
        )
        student = baked(student, args.checkpoint)
    paths = _audio_paths(args.audio, state, args.utterances)
    source, padding_mask = _batch(paths, student.normalize)
    compact = prune_student(student, source, padding_mask, args.checkpoint)
    _write(args.output, state, student, compact)
    _report(student, compact, args.output, len(paths))
    return 0


def _audio_paths(audio: str | None, state: dict[str, Any], num_utterances: int) -> list[Path]:
    """Audio for the check: what was asked for, else the valid or train manifest of the run."""
    if audio and not audio.endswith(".tsv"):
        return [Path(audio)]
    if audio:
        candidates = [Path(audio)]
    else:
        data = Path(str((state.get("cfg") or {}).get("task", {}).get("data") or "."))
        candidates = [data / "valid.tsv", data / "train.tsv"]
    manifest_path = next((path for path in candidates if path.is_file()), None)
    if manifest_path is None:
        raise ValueError(
            f"pruning is checked on audio, but there is no manifest at {' or '.join(map(str, candidates))}; pass --audio MANIFEST.tsv or "
            "--audio FILE.flac"
        )
    manifest = read_manifest(manifest_path)
    return [Path(manifest.audio_path(i)) for i in range(min(num_utterances, len(manifest.entries)))]


def _batch(paths: list[Path], normalize: bool) -> tuple[Tensor, Tensor]:
    """Audio files -> [B, S] and padding mask [B, S]."""
    waveforms = [torch.from_numpy(read_audio(path))[: MAX_SECONDS * SAMPLE_RATE] for path in paths]
    lengths = torch.tensor([len(w) for w in waveforms])
    source = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    padding_mask = torch.arange(source.shape[1]) >= lengths[:, None]
    return (normalize_waveforms(source, padding_mask) if normalize else source), padding_mask


def _write(path: str, state: dict[str, Any], student: ParsedCheckpoint, compact: CompactStudent) -> None:
    model = _encoder_options(student, compact) if student.head_state is None else _ctc_options(student, compact)
    task = {
        **((state.get("cfg") or {}).get("task") or {}),
        "normalize": student.normalize,
        "teacher_path": None,
        "post_save_script": None,
    }
    if compact.config.embed_dim < student.config.embed_dim and model.get("head_mode") == "predlayer":
        model["head_hidden_dim"] = model.get("head_hidden_dim") or student.config.embed_dim
    heads = {k: v for k, v in student.extra_state.items() if k.startswith("heads.")}
    heads = cut_heads(heads, compact.plan.width)
    if compact.head_state is None:
        compat.write_checkpoint(path, {**compact.state, **heads}, model, task)
        return
    weights = {f"w2v_encoder.w2v_model.{name}": value for name, value in compact.state.items()}
    weights |= {f"w2v_encoder.proj.{name}": value for name, value in compact.head_state.items()}
    dictionary = {} if student.symbols is None else {"target_dictionary": fairseq_dictionary(student.symbols)}
    compat.write_checkpoint(path, {**weights, **heads}, model, task, dictionary)


# of a student that was cut: nothing of it is gated, and sizes refer to itself again
_WITHOUT_GATES = {
    **{"student_path": None, "prune_units": [], "prune_measure": "params", "latency_table": None, "latency": None},
    "reference_cost": 0.0,
}


def _encoder_options(student: ParsedCheckpoint, compact: CompactStudent) -> dict[str, Any]:
    """Options of the `ssl_student` that the compact encoder is."""
    return {
        **student.pretraining_options,
        "_name": "ssl_student",
        "encoder": compact.config.to_json(),
        "encoder_embed_dim": compact.config.embed_dim,
        **_WITHOUT_GATES,
        "normalize": student.normalize,
    }


def _ctc_options(student: ParsedCheckpoint, compact: CompactStudent) -> dict[str, Any]:
    """Options of the compact `wav2vec_ctc_student`, whose masks are in its weights."""
    encoder = options_from_config(compact.config, "ssl_student", student.normalize)
    masks = {f.name: f.default for f in dataclasses.fields(MaskOptions)}
    return {
        **student.model_options,
        **{name: value for name, value in masks.items() if name in student.model_options},
        "w2v_path": None,
        "w2v_args": {
            "task": {"_name": "audio_pretraining", "data": "", "normalize": student.normalize},
            "model": encoder,
        },
        "masks": False,
        **_WITHOUT_GATES,
        "normalize": student.normalize,
    }


def _report(student: ParsedCheckpoint, compact: CompactStudent, output: str, num_utterances: int) -> None:
    before = count_parameters(student.config, GateCounts.full(student.config))
    after = count_parameters(compact.config, GateCounts.full(compact.config))
    macs_before = count_macs_per_second(student.config, GateCounts.full(student.config))
    macs_after = count_macs_per_second(compact.config, GateCounts.full(compact.config))
    print(f"parameters     {before:>14,} -> {after:>14,}  ({1 - after / before:.1%} fewer)")
    print(f"MACs/s audio   {macs_before:>14,.0f} -> {macs_after:>14,.0f}  ({1 - macs_after / macs_before:.1%} fewer)")
    full, kept = compact.before.as_dict(), compact.after.as_dict()
    for unit in full:
        pairs = list(zip(kept[unit], full[unit], strict=True))
        if unit in ("width", "pos_conv"):  # per group; what is read is their number
            pairs = [(sum(kept[unit]), sum(full[unit]))]
        print(f"{unit:<16}" + " ".join(f"{k}/{f}" for k, f in pairs))
    for line in _speed(student, compact):
        print(line)
    print(
        f"check on {num_utterances} utterances: relative error {compact.equivalence.relative_error:.1e} between gated and pruned student"
    )
    print(f"wrote {output}")


def _speed(student: ParsedCheckpoint, compact: CompactStudent) -> list[str]:
    """Real-time factor by the table that the student was pruned by, and measured here; nothing without a table."""
    text = student.student_options.get("latency")
    if str(student.student_options.get("prune_measure")) != "latency" or not text:
        return []
    table = LatencyTable.from_json(str(text), "the latency table of the checkpoint")
    num_threads = int(table.machine["num_threads"])
    predicted = [float(table(student.config, counts)) for counts in (compact.before, compact.kept)]
    encoders = [SpeechEncoder(config).eval() for config in (student.config, compact.config)]
    measured = measure_encoders(encoders, table.audio_s, RTF_REPEATS, num_threads)
    before, after = (speed.rtf for speed in measured)
    facts = f"{table.machine['cpu']}, {num_threads} threads"
    return [
        f"RTF predicted  {predicted[0]:>14.4f} -> {predicted[1]:>14.4f}  (table of {table.machine.get('device', facts)})",
        f"RTF measured   {before:>14.4f} -> {after:>14.4f}  (this CPU, {num_threads} threads; {before / after:.2f}x as fast)",
    ]
