"""`s3distill old-head RUN OLD OUT`: a recogniser of an old task, the encoder of a later run with the head of that task."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s3distill import compat
from s3distill.cli.masks_bake import Dense, write_dense
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.masks.options import ENCODER, HEAD
from s3distill.masks.state import baked

LEARNED = "forgetting.old_heads."  # in the state of the criterion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="checkpoint of the training on the new task")
    parser.add_argument("old", metavar="OLD", help="checkpoint of the old task, with its head and dictionary")
    parser.add_argument("output", metavar="OUT", help="recogniser of the old task to write")


def run(args: argparse.Namespace) -> int:
    if any(os.path.realpath(args.output) == os.path.realpath(path) for path in (args.run, args.old)):
        raise ValueError(f"OUT must be another file than what is read, but is {args.output}; nothing was written")
    state, old_state = compat.load_checkpoint(args.run), compat.load_checkpoint(args.old)
    new, old = baked(parse_checkpoint(state, args.run), args.run), parse_checkpoint(old_state, args.old)
    _require_head(old, args.old)
    if old.normalize != new.normalize:
        raise ValueError(
            f"RUN and OLD must hear audio alike, but normalize is {new.normalize} in {args.run} and {old.normalize} in {args.old}; was RUN "
            "started from OLD?"
        )
    head = learned_head(state, args.old)
    origin = "as the run learned it along" if head is not None else f"as it is in {args.old}"
    if head is None and any(key.startswith(LEARNED) for key in state.get("criterion") or {}):
        origin += "; the run learned heads along, but of other paths: pass OLD as criterion.old_model_paths has it to take one of them"
    head = head or old.head_state
    assert head is not None
    _check(new, head, args.run, args.old)
    weights = {f"{ENCODER}.{key}": value for key, value in new.encoder_state.items()}
    weights |= {f"{HEAD}.{key}": value for key, value in head.items()}
    info = {"normalize": new.normalize, "labels": _labels(old_state) or _labels(state)}
    write_dense(Path(args.output), Dense(weights, new, info, old.symbols), with_dictionary=True)
    print(f"head: {origin}")
    return 0


def learned_head(state: Mapping[str, Any], old_path: str) -> dict[str, Tensor] | None:
    """The head of an old model that a run of ctc_distill learned along (criterion.old_heads=learn); None: it has none of this model."""
    options = (state.get("cfg") or {}).get("criterion") or {}
    paths = [os.path.realpath(path) for path in options.get("old_model_paths") or []]
    if os.path.realpath(old_path) not in paths:
        return None
    prefix = f"{LEARNED}{paths.index(os.path.realpath(old_path))}."
    learned = state.get("criterion") or {}
    return {key.removeprefix(prefix): value for key, value in learned.items() if key.startswith(prefix)} or None


def _require_head(old: ParsedCheckpoint, path: str) -> None:
    if old.head_state is None or old.pooled or old.symbols is None:
        raise ValueError(
            f"OLD must be a recogniser with a CTC head and its dictionary, but {path} has none; pass the fine-tuned checkpoint"
        )


def _check(new: ParsedCheckpoint, head: Mapping[str, Tensor], run: str, old: str) -> None:
    if any("gates." in name for name in new.extra_state):
        raise ValueError(f"{run} has gates that were not pruned yet; cut them first: s3distill prune {run} compact.pt")
    if head["weight"].shape[1] != new.config.output_dim:
        raise ValueError(
            f"the head of {old} must fit the encoder of {run}, but is for width {head['weight'].shape[1]}, and the encoder has "
            f"{new.config.output_dim}; was RUN started from OLD?"
        )


def _labels(state: Mapping[str, Any]) -> str | None:
    labels = ((state.get("cfg") or {}).get("task") or {}).get("labels")
    return labels if isinstance(labels, str) else None
