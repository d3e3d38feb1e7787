"""`s3distill convert IN OUT`: any checkpoint or folder -> a fairseq checkpoint (OUT.pt) or a folder with model.safetensors."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3distill import compat
from s3distill.cli.masks_bake import TASK_OPTIONS
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.folder import to_folder
from s3distill.encoder.layout import checkpoint_layout
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import stock_options
from s3distill.export.folder import check_replaceable, write_folder
from s3distill.masks.state import baked

WRITER = "s3distill convert"  # what the files that this command wrote carry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="IN",
        help="folder of transformers (wav2vec2, hubert, wavlm, data2vec-audio), WavLM-*.pt, or any checkpoint that s3distill loads",
    )
    parser.add_argument(
        "output", metavar="OUT", help="NAME.pt: a fairseq checkpoint; any other name: a folder for s3distill.load"
    )
    parser.add_argument(
        "--encoder-only",
        action="store_true",
        help="leave the CTC head out, so that stock fairseq fine-tunes OUT.pt anew",
    )


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    _check_output(output, args.source)
    parsed = baked(parse_checkpoint(compat.load_checkpoint(args.source), args.source), args.source)
    if args.encoder_only:
        parsed.head_state, parsed.symbols, parsed.pooled = None, None, False
    # complete, of the right shapes and finite, before anything is written
    with torch.device("meta"):
        SpeechEncoder(parsed.config).load_encoder_state(parsed.encoder_state, args.source)
    name = _write_checkpoint(output, parsed) if output.suffix == ".pt" else _write_folder(output, parsed)
    size = compat.checkpoint_size(output)
    print(
        f"wrote {output}: {name}, {sum(v.numel() for v in parsed.encoder_state.values()):,} parameters, normalize="
        f"{str(parsed.normalize).lower()}, {size / 1e6:.2f} MB"
    )
    print(_how_to_use(output, name, parsed))
    return 0


def _check_output(output: Path, source: str) -> None:
    """Refuses to write over what is read, and over anything that this command did not write."""
    if os.path.realpath(output) == os.path.realpath(source):
        raise ValueError(f"OUT must be another place than IN, but is {output}; nothing was written")
    if output.suffix in (".safetensors", ".bin", ".ckpt", ".pth"):
        raise ValueError(
            f"OUT must be NAME.pt for a fairseq checkpoint or a folder's name for config.json and model.safetensors, but is {output}"
        )
    if output.suffix != ".pt":
        check_replaceable(output)
    elif os.path.lexists(output) and not _wrote(output):
        raise FileExistsError(
            f"{output} is there already and was not written by `{WRITER}`, so it is left as it is; name another file, or remove it"
        )


def _wrote(output: Path) -> bool:
    try:
        return bool((compat.load_checkpoint(output).get("extra_state") or {}).get("written_by") == WRITER)
    except (ValueError, OSError, AttributeError):
        return False


def _gates(parsed: ParsedCheckpoint) -> dict[str, Tensor]:
    """L0 gates of a student that was not pruned yet, below ``gates.``."""
    return {key.partition("gates.")[2]: v for key, v in parsed.extra_state.items() if "gates." in key}


def _write_checkpoint(output: Path, parsed: ParsedCheckpoint) -> str:
    """A fairseq checkpoint: pre-trained, or fine-tuned where there is a CTC head. Returns the name of its encoder's model."""
    if parsed.pooled and parsed.head_state is not None:
        raise ValueError(
            "a head for whole utterances (wav2vec_label_st) has no place in a converted checkpoint; pass --encoder-only, or a folder's "
            "name as OUT"
        )
    options = stock_options(parsed.config, parsed.family, parsed.normalize)
    gates = {f"gates.{key}": value for key, value in _gates(parsed).items()}
    if gates:
        options["prune_units"] = list(parsed.student_options.get("prune_units") or [])
    layout = checkpoint_layout(
        options, parsed.encoder_state, parsed.normalize, parsed.head_state, None, extra_state=gates
    )
    task, task_state = layout["cfg"]["task"], {}
    if parsed.head_state is not None:
        task = {**TASK_OPTIONS, "labels": "ltr", "normalize": parsed.normalize}
        if parsed.symbols is not None:
            task_state["target_dictionary"] = _dictionary(parsed.symbols)
    compat.write_checkpoint(output, layout["model"], layout["cfg"]["model"], task, task_state, WRITER)
    return str(options["_name"])


def _dictionary(symbols: list[str]) -> Any:
    try:
        from s3distill.tasks._bank_model import dictionary_of
    except ImportError as error:
        raise RuntimeError(
            "the dictionary of a fine-tuned checkpoint is an object of fairseq, which is not installed; install it (pip install "
            "'s3distill[train]'), pass --encoder-only, or name a folder as OUT"
        ) from error
    return dictionary_of(symbols)


def _write_folder(output: Path, parsed: ParsedCheckpoint) -> str:
    contents, tensors = to_folder(
        parsed.config,
        parsed.family,
        parsed.encoder_state,
        parsed.normalize,
        parsed.head_state,
        parsed.symbols,
        parsed.pooled,
        _gates(parsed),
        list(parsed.student_options.get("prune_units") or []),
    )
    write_folder(output, contents, tensors)
    return parsed.family


def _how_to_use(output: Path, name: str, parsed: ParsedCheckpoint) -> str:
    if output.suffix != ".pt":
        return f's3distill.load("{output}") reads it, and every option that takes a checkpoint of s3distill does'
    if parsed.head_state is not None:
        return (
            "a wav2vec_ctc model: s3distill.load reads it, and fairseq-generate decodes with it (--user-dir s3distill)"
        )
    needs = "" if name == "wav2vec2" else " (with common.user_dir=s3distill)"
    return f"model.w2v_path={output} fine-tunes it with wav2vec_ctc{needs}; task.teacher_path and model.student_path take it too"
