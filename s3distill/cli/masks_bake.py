"""`s3distill masks bake`: masks multiplied into the weights -> an ordinary fine-tuned checkpoint for stock fairseq."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from s3distill import compat
from s3distill.cli.masks import read_backbone
from s3distill.cli.masks_pack import options_of
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.options import stock_options
from s3distill.masks.bank import MaskBank
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.options import ENCODER, HEAD
from s3distill.masks.pack import dense_state, entry_state, kind_of
from s3distill.masks.state import baked

# what fairseq reads of a checkpoint's task when it loads data for it; everything else has its default
TASK_OPTIONS: dict[str, Any] = {
    **{"_name": "audio_finetuning", "data": "", "sample_rate": SAMPLE_RATE, "enable_padding": False},
    **{"max_sample_size": None, "min_sample_size": None, "num_batch_buckets": 0, "tpu": False, "subsample": 1.0},
    **{"text_compression_level": "none", "binarized_dataset": False, "precompute_mask_config": None},
    **{"multi_corpus_keys": None, "multi_corpus_sampling_weights": None, "target_dictionary": None},
    **{"autoregressive": False, "eval_wer": False, "eval_bleu": False},
}


@dataclass
class Dense:
    """What the checkpoint is made of: weights with the masks in them, the encoder's origin, options, dictionary."""

    state: dict[str, Tensor]
    encoder: ParsedCheckpoint
    info: Mapping[str, Any]
    symbols: list[str] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] [--no-dictionary] (RUN | --bank FILE --name NAME --backbone FILE) OUT"
    parser.add_argument(
        "paths", nargs="+", metavar="[RUN] OUT", help="trained run, if no --bank is given; file to write"
    )
    parser.add_argument("--bank", metavar="FILE", help="take the masks of a bank instead of a run")
    parser.add_argument("--name", help="entry of that bank")
    parser.add_argument("--backbone", metavar="FILE", help="checkpoint that the bank's masks lie over")
    parser.add_argument(
        "--no-dictionary",
        action="store_true",
        help="without the dictionary, which fairseq then takes from the data; torch >= 2.6 reads such a file without s3distill too",
    )


def run(args: argparse.Namespace) -> None:
    *sources, output = args.paths
    options = {"--bank": args.bank, "--name": args.name, "--backbone": args.backbone}
    missing = [option for option, value in options.items() if not value]
    if len(sources) > 1 or (len(sources) == 1 and len(missing) < 3) or (not sources and missing):
        raise ValueError(
            f"masks come from a run (s3distill masks bake RUN OUT) or from a bank (--bank FILE --name NAME --backbone FILE OUT), but given "
            f"are {len(args.paths)} paths and {', '.join(o for o in options if o not in missing) or 'no option'}"
        )
    inputs = [*sources, *(path for path in (args.bank, args.backbone) if path)]
    if any(os.path.realpath(output) == os.path.realpath(path) for path in inputs):
        raise ValueError(f"OUT must be another file than what is read, but is {output}; nothing was written")
    dense = _from_run(sources[0]) if sources else _from_bank(args.bank, args.name, args.backbone)
    if dense.info.get("kind", "ctc") != "ctc":
        raise ValueError(
            f"bake makes wav2vec_ctc models, but this head is for {dense.info['kind']}; decode it with its bank"
        )
    write_dense(Path(output), dense, with_dictionary=not args.no_dictionary)


def _from_run(path: str) -> Dense:
    state = compat.load_checkpoint(path)
    trained = parse_checkpoint(state, path)
    if not trained.scores:
        raise ValueError(
            f"{path} must have masks to bake, but has none (model {trained.model_name!r}): it is dense already"
        )
    refuse_gates(trained, path)
    dense = baked(trained, path)
    weights = {f"{ENCODER}.{key}": value for key, value in dense.encoder_state.items()}
    weights |= {f"{HEAD}.{key}": value for key, value in (dense.head_state or {}).items()}
    info = {**options_of(trained, state), "normalize": trained.normalize, "kind": kind_of(trained)}
    return Dense(weights, trained, info, trained.symbols)


def refuse_gates(run: ParsedCheckpoint, path: str) -> None:
    """Gates that were not pruned yet have no place in an ordinary model, nor in a bank (`ValueError`)."""
    if any("gates." in name for name in run.extra_state):
        raise ValueError(
            f"{path} has gates beside its masks, which would be lost; cut both into a compact model: s3distill prune {path} compact.pt"
        )


def _from_bank(bank_path: str, name: str, backbone_path: str) -> Dense:
    bank = MaskBank.open(bank_path)
    entry = bank.entry(name)
    backbone = read_backbone(backbone_path)
    bank.check_backbone(backbone_checksum(backbone.encoder_state), backbone_path)
    return Dense(dense_state(entry_state(backbone, entry), entry.masks), backbone, entry.info, entry.symbols)


def write_dense(path: Path, dense: Dense, with_dictionary: bool) -> None:
    """Writes a stock `wav2vec_ctc` checkpoint."""
    normalize = bool(dense.info.get("normalize", False))
    encoder_options = stock_options(dense.encoder.config, dense.encoder.family, normalize)
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        "data": "",
        "normalize": normalize,
        "blank_weight": float(dense.info.get("blank_weight") or 0),
        "blank_mode": dense.info.get("blank_mode") or "add",
        "w2v_args": {
            "model": encoder_options,
            "task": {"_name": "audio_pretraining", "data": "", "normalize": normalize},
        },
    }
    task = {**TASK_OPTIONS, "labels": dense.info.get("labels"), "normalize": normalize}
    task_state = {}
    if with_dictionary and dense.symbols is not None:
        task_state["target_dictionary"] = fairseq_dictionary(dense.symbols)
    state = {f"w2v_encoder.{key}": value for key, value in dense.state.items()}
    compat.write_checkpoint(path, state, model, task, task_state)
    print(f"wrote {path}: wav2vec_ctc over {encoder_options['_name']}, {path.stat().st_size / 1e6:.2f} MB")
    if encoder_options["_name"] == "ssl_student":
        print("stock fairseq has no model of this encoder's shape: load it with --user-dir s3distill")


def fairseq_dictionary(symbols: list[str]) -> Any:
    """fairseq's own `Dictionary`, which is what a fine-tuned checkpoint holds."""
    try:
        from s3distill.tasks._bank_model import dictionary_of
    except ImportError as error:
        raise RuntimeError(
            "the dictionary of a checkpoint is an object of fairseq, which is not installed; install it (pip install 's3distill[train]'), "
            "or pass --no-dictionary to `s3distill masks bake`"
        ) from error
    return dictionary_of(symbols)
