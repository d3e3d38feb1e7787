"""`s3distill masks pack RUN`: the masks of a trained run, its head and its dictionary -> an entry of a bank."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from s3distill import compat
from s3distill.cli.masks import add_bank, describe, read_backbone, saving
from s3distill.data.manifest import read_dictionary
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.masks.bank import BankEntry, MaskBank, check_name
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.pack import pack_run

SPECIAL_SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>"]  # in front of every dictionary of fairseq


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="checkpoint of a wav2vec_ctc_st run")
    add_bank(parser, named=True)
    parser.add_argument(
        "--backbone", metavar="FILE", help="checkpoint that the run's masks lie over (default: its model.w2v_path)"
    )
    parser.add_argument("--dict", metavar="FILE", help="dictionary of a run whose checkpoint has none (dict.ltr.txt)")


def run(args: argparse.Namespace) -> None:
    check_name(args.name)
    bank = MaskBank.open(args.bank) if Path(args.bank).exists() else None
    if bank is not None:
        bank.refuse_duplicate(args.name)  # before minutes of reading
    state = compat.load_checkpoint(args.run)
    trained = parse_checkpoint(state, args.run)
    backbone_path = args.backbone or _backbone_of(trained, args.run)
    backbone = read_backbone(backbone_path)
    checksum = backbone_checksum(backbone.encoder_state)
    if bank is not None:
        bank.check_backbone(checksum, backbone_path)
    if args.dict:
        _take_dictionary(trained, Path(args.dict), args.run)
    info = {**options_of(trained, state), "date": datetime.now(UTC).isoformat(timespec="seconds"), "source": args.run}
    entry = pack_run(trained, backbone, args.name, info, args.run, backbone_path)
    if bank is None:
        num_parameters = sum(tensor.numel() for tensor in backbone.encoder_state.values())
        bank = MaskBank.create(args.bank, checksum, num_parameters, [entry])
    else:
        bank.add(entry)
    _report(entry, bank)


def _take_dictionary(trained: ParsedCheckpoint, path: Path, run_path: str) -> None:
    symbols = [*SPECIAL_SYMBOLS, *read_dictionary(path)]
    if trained.symbols is not None and trained.symbols != symbols:
        differing = sorted({*trained.symbols} ^ {*symbols})
        raise ValueError(
            f"{path} must be the dictionary of {run_path}, which carries its own, but differs "
            f"{f'in {differing[:5]}' if differing else 'in the order of its symbols'}; leave out --dict"
        )
    trained.symbols = symbols


def _backbone_of(trained: ParsedCheckpoint, path: str) -> str:
    backbone = str(trained.model_options.get("w2v_path") or "")
    if not backbone or not Path(backbone).exists():
        raise ValueError(
            f"the backbone of {path} must be there, to see what the run changed, but its model.w2v_path {backbone!r} is not here; pass "
            "--backbone FILE"
        )
    return backbone


def options_of(trained: ParsedCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
    """What decoding has to know of the run's options."""
    config = state.get("cfg") or {}
    task = config.get("task") or state.get("args") or {}
    options = trained.model_options
    return {
        "labels": task.get("labels"),
        "blank_weight": float(options.get("blank_weight") or 0),
        "blank_mode": str(options.get("blank_mode") or "add"),
    }


def _report(entry: BankEntry, bank: MaskBank) -> None:
    size = entry.size()
    num_connections = sum(mask.numel() for mask in entry.masks.values())
    print(
        f"{entry.name}: {len(entry.masks)} masks ({entry.info['pattern']}) keep {entry.info['density']:.2%} of {num_connections:,} "
        f"connections, {size.masks / 1e6:.2f} MB; head and other trained tensors ({len(entry.tensors)}), {size.tensors / 1e6:.2f} MB"
    )
    if entry.symbols is None:
        print(f"{entry.name} has no dictionary: decoding will take the data's; pass --dict to keep one")
    print(f"{bank.path}: {', '.join(bank.names)}")
    print(saving(describe(bank)))
