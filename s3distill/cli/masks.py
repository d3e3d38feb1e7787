"""`s3distill masks`: one backbone and a bank of masks, instead of a model for every language."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
from typing import Any

from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.masks.bank import MaskBank
from s3distill.masks.masked_model import MaskedModel

# sub-commands with a module of their own: name -> (module, one-line help)
MODULES = {
    "pack": ("s3distill.cli.masks_pack", "add the masks of a trained run to a bank"),
    "bake": ("s3distill.cli.masks_bake", "multiply masks in: an ordinary dense wav2vec_ctc checkpoint"),
    "similarity": ("s3distill.cli.masks_similarity", "how much the masks of two languages share"),
    "inventory": ("s3distill.cli.masks_inventory", "phoneme inventories of languages, and how alike they are"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="masks_command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, run_command: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        added.set_defaults(run_masks_command=run_command)
        return added

    for name, (module_name, summary) in MODULES.items():
        if importlib.util.find_spec(module_name):
            module = importlib.import_module(module_name)
            module.add_arguments(command(name, summary, module.run))
    listing = command("list", "entries of a bank, and what they save", run_list)
    add_bank_or_path(listing)
    listing.add_argument("--json", action="store_true", help="print JSON")
    verify = command("verify", "read a bank whole, and check that a backbone is its own", run_verify)
    add_bank_or_path(verify)
    verify.add_argument("--backbone", metavar="FILE", help="checkpoint that the masks should lie over")
    extract = command("extract", "make a bank of one entry", run_extract)
    add_bank(extract, named=True)
    extract.add_argument("output", metavar="OUT", help="bank to write; it must not be there yet")
    remove = command("remove", "take an entry out of a bank", run_remove)
    add_bank(remove, named=True)


def add_bank(parser: argparse.ArgumentParser, named: bool = False) -> None:
    parser.add_argument("--bank", required=True, metavar="FILE", help="mask bank (.safetensors)")
    if named:
        parser.add_argument("--name", required=True, help="entry of the bank, e.g. nl")


def add_bank_or_path(parser: argparse.ArgumentParser) -> None:
    """Where a bank is all that a command is about, its file may stand alone."""
    bank = parser.add_mutually_exclusive_group(required=True)
    bank.add_argument("path", nargs="?", metavar="BANK", help="mask bank (.safetensors)")
    bank.add_argument("--bank", metavar="FILE", help="the same")


def run(args: argparse.Namespace) -> int:
    return int(args.run_masks_command(args) or 0)


def read_backbone(path: str) -> ParsedCheckpoint:
    """The checkpoint that masks lie over, pre-trained or fine-tuned."""
    return parse_checkpoint(compat.load_checkpoint(path), path)


def run_list(args: argparse.Namespace) -> None:
    bank = MaskBank.open(args.bank or args.path)
    listing = describe(bank)
    lines = json.dumps(listing, indent=2, ensure_ascii=False).split("\n") if args.json else table(listing)
    print("\n".join(map(printable, lines)))


def printable(line: str) -> str:
    """Control characters, which a bank of unknown origin may hold, as the escapes of JSON: a terminal would obey them."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def describe(bank: MaskBank) -> dict[str, Any]:
    """What a bank holds and what it costs in bytes, as plain values for JSON.

    Returns:
        ``backbone`` (checksum, num_parameters, bytes in float32), ``masks`` (per entry its info and bytes), ``header_bytes``,
        ``bank_bytes`` (the file), ``total_bytes`` (backbone and file), ``separate_bytes`` (a dense float32 model per entry) and
        ``saved``, the share of the latter that is not needed.
    """
    size = bank.size()
    masks = []
    for name in bank.names:
        symbols, entry = bank.symbols(name), size.entries[name]
        counts = {
            "num_masks": len(bank.module_names(name)),
            "num_tensors": len(bank.tensor_names(name)),
            "num_symbols": None if symbols is None else len(symbols),
        }
        sizes = {"mask_bytes": entry.masks, "tensor_bytes": entry.tensors, "bytes": entry.total}
        masks.append({"name": name, **bank.info(name)} | {"name": name, **counts, **sizes})
    return {
        "path": str(bank.path),
        "backbone": {"checksum": bank.checksum, "num_parameters": bank.num_parameters, "bytes": size.backbone},
        "masks": masks,
        "header_bytes": size.header,
        "bank_bytes": size.bank,
        "total_bytes": size.total,
        "separate_bytes": size.separate,
        "saved": size.saved,
    }


def table(listing: dict[str, Any]) -> list[str]:
    """The listing as lines to read."""
    backbone = listing["backbone"]
    lines = [
        f"{listing['path']}, over the backbone {backbone['checksum'][:12]} ({backbone['num_parameters']:,} parameters)",
        "",
        f"{'name':<12}{'masks':>6}{'kept':>8}  {'pattern':<13}{'symbols':>8}{'trained':>8}{'MB':>9}  {'packed':<21}from",
    ]
    for mask in listing["masks"]:
        kept = f"{mask['density']:.2%}" if "density" in mask else ""
        lines.append(
            f"{mask['name']:<12}{mask['num_masks']:>6}{kept:>8}  {mask.get('pattern', ''):<13}{mask['num_symbols'] or '':>8}"
            f"{mask['num_tensors']:>8}{mask['bytes'] / 1e6:>9.2f}  {mask.get('date', '')[:19]:<21}{mask.get('source', '')}".rstrip()
        )
    return [*lines, "", saving(listing)]


def saving(listing: dict[str, Any]) -> str:
    """One line: what backbone and bank take, against separate models."""
    return (
        f"backbone {listing['backbone']['bytes'] / 1e6:,.2f} MB + bank {listing['bank_bytes'] / 1e6:,.2f} MB = "
        f"{listing['total_bytes'] / 1e6:,.2f} MB, against {listing['separate_bytes'] / 1e6:,.2f} MB in {len(listing['masks'])} separate "
        f"models: {listing['saved']:.1%} saved"
    )


def run_verify(args: argparse.Namespace) -> int:
    path = args.bank or args.path
    bank = MaskBank.open(path)
    faults = [
        f"{path}: the bytes of {name!r} must be those that were packed, but are not; take a copy, or pack it anew"
        for name in bank.damaged_entries()
    ]
    if args.backbone:
        backbone = read_backbone(args.backbone)
        try:
            model = MaskedModel.load(backbone, bank, args.backbone)
            for name in bank.names:
                model.use(name)
        except ValueError as error:
            faults.append(str(error))
    for fault in faults:
        print(fault)
    if faults:
        return 1
    over = f", all over {args.backbone}" if args.backbone else ""
    print(f"{path}: {len(bank.names)} entries, no faults{over}")
    return 0


def run_extract(args: argparse.Namespace) -> None:
    alone = MaskBank.open(args.bank).extract(args.name, args.output)
    print(f"wrote {args.output}: {args.name}, {os.path.getsize(alone.path) / 1e6:.2f} MB")


def run_remove(args: argparse.Namespace) -> None:
    bank = MaskBank.open(args.bank)
    bank.remove(args.name)
    print(f"removed {args.name} from {args.bank}; it has {', '.join(bank.names) or 'no entries'} now")
