"""`s3distill keep-heads CKPT OUT`: a distilled student whose output is what its prediction heads make of it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.gates import GateCounts, count_macs_per_second, count_parameters
from s3distill.heads import HeadsConfig, keep_heads, parse_pairs_per_teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="student that was distilled with prediction heads")
    parser.add_argument("output", metavar="OUT", help="checkpoint to write, for model.w2v_path")
    parser.add_argument(
        "--layers",
        default="all",
        metavar="12",
        help="teacher layers whose predictions are the output, e.g. 12 or 4,8,12; several are summed with softmax weights that "
        "fine-tuning learns (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    if os.path.realpath(args.output) == os.path.realpath(args.checkpoint):
        raise ValueError(f"OUT must be another file than CKPT, but is {args.output}; nothing was written")
    state = compat.load_checkpoint(args.checkpoint)
    student = parse_checkpoint(state, args.checkpoint)
    heads = heads_of(student, args.checkpoint)
    found = {k.removeprefix("heads."): v for k, v in student.extra_state.items() if k.startswith("heads.")}
    own = {name: value for name, value in found.items() if not name.startswith("others.")}
    kept, kept_state = keep_heads(heads, own, _layers(args.layers))
    config = dataclasses.replace(student.config, output=kept)
    options: Mapping[str, Any] = {
        **student.pretraining_options,
        **{"_name": "ssl_student", "encoder": config.to_json(), "encoder_embed_dim": config.output_dim},
        **{"student_path": None, "init_layers": "", "distill_layers": "", "normalize": student.normalize},
    }
    task = {**((state.get("cfg") or {}).get("task") or {}), "normalize": student.normalize, "teacher_path": None}
    weights = student.encoder_state | {f"output_heads.{name}": value for name, value in kept_state.items()}
    compat.write_checkpoint(args.output, weights, dict(options), task)
    _report(student, config, args.output)
    return 0


def heads_of(student: ParsedCheckpoint, name: str) -> HeadsConfig:
    """The heads of the first teacher.

    Raises:
        ValueError: the checkpoint has none, or gates that were not pruned yet.
    """
    options = student.pretraining_options
    if any(key.startswith("gates.") for key in student.extra_state):
        raise ValueError(
            f"{name} has gates that were not pruned yet; cut them first: s3distill prune {name} compact.pt"
        )
    if not options.get("distill_layers") or not any(key.startswith("heads.") for key in student.extra_state):
        raise ValueError(
            f"{name} must be an ssl_student with prediction heads (model.distill_layers, another head_mode than none), but has none; "
            "fine-tuned students have lost them"
        )
    num_teachers = 1 + len(options.get("extra_teacher_dims") or [])
    return HeadsConfig(
        pairs=parse_pairs_per_teacher(str(options["distill_layers"]), num_teachers)[0],
        student_dim=student.config.embed_dim,
        teacher_dim=int(options["teacher_dim"]),
        num_student_layers=student.config.num_layers,
        mode=str(options["head_mode"]),
        sharing=str(options["head_sharing"]),
        upsample=student.config.time_reduction,
    )


def _layers(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        return [int(item) for item in text.split(",")]
    except ValueError as error:
        raise ValueError(f"`--layers` must be teacher layers such as 12 or 4,8,12, or all, but is {text!r}") from error


def _report(student: ParsedCheckpoint, config: Any, output: str) -> None:
    counts = GateCounts.full(config)
    before, after = count_parameters(student.config, counts), count_parameters(config, counts)
    macs = count_macs_per_second(config, counts)
    print(f"parameters     {before:>14,} -> {after:>14,}")
    print(f"MACs/s audio   {macs:>14,.0f}")
    layers = ", ".join(str(teacher) for _, teacher in config.output.pairs)
    print(
        f"wrote {output}: width {config.output_dim}, the prediction of teacher layer {layers}; fine-tune with model.w2v_path={output}"
    )
