"""`s3distill fisher CKPT MANIFEST`: how much a recogniser needs each of its weights, for criterion.ewc_paths."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from s3distill import compat
from s3distill.analysis.fisher import Fisher, combine_fishers, estimate_fisher, find_utterances
from s3distill.analysis.fisher_file import check_output, read_fisher, write_fisher
from s3distill.cli._device import device_of
from s3distill.data.manifest import label_path, read_dictionary
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.ctc_head import SPECIAL_SYMBOLS
from s3distill.encoder.speech_model import SpeechModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s (CKPT MANIFEST [options] | --combine FISHER FISHER ...) -o FISHER.safetensors"
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="CKPT MANIFEST",
        help="recogniser trained with CTC, and audio of the task that it learned",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FISHER.safetensors", help="file to write")
    parser.add_argument("--labels", default="ltr", metavar="ltr", help="label file beside the manifest (%(default)s)")
    parser.add_argument(
        "--from-model",
        action="store_true",
        help="transcripts that the model samples (the Fisher information proper); no labels are read",
    )
    parser.add_argument("--max-utterances", type=int, metavar="N", help="so many, spread over the manifest (all)")
    parser.add_argument("--seed", type=int, help="of --from-model (1)")
    parser.add_argument("--device", default="cpu", help="of torch, e.g. cuda (%(default)s)")
    parser.add_argument(
        "--combine", nargs="+", metavar="FISHER", help="add files of one model, each weighted by its utterances"
    )


def run(args: argparse.Namespace) -> int:
    output = check_output(args.output)
    if bool(args.combine) == bool(args.paths) or (args.paths and len(args.paths) != 2):
        raise ValueError(
            f"pass a checkpoint and a manifest, or --combine with files, but not both; given are {len(args.paths)} paths and "
            f"{len(args.combine or [])} files"
        )
    _check_options(args)
    fisher = combine_fishers([read_fisher(path) for path in args.combine], args.combine) if args.combine else _new(args)
    write_fisher(output, fisher)
    _report(fisher, output)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Options that would do nothing, or count utterances twice, are refused, and outputs that are inputs (`ValueError`)."""
    given = {"--from-model": args.from_model, "--max-utterances": args.max_utterances, "--seed": args.seed}
    named = [name for name, value in given.items() if value not in (None, False)]
    if args.combine and named:
        raise ValueError(f"{named[0]} is about utterances, but --combine adds files that are there; leave it out")
    if args.seed is not None and not args.from_model:
        raise ValueError("--seed is about transcripts that the model samples; pass --from-model, or leave it out")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0, but is {args.seed}")
    files = [os.path.realpath(path) for path in args.combine or []]
    for path in files:
        if files.count(path) > 1:
            raise ValueError(
                f"--combine must be given each file once, or its utterances count twice, but has {path} twice"
            )
    if os.path.realpath(args.output) in files:
        raise ValueError(f"-o must be another file than what is combined, but is {args.output}; nothing was written")


def _new(args: argparse.Namespace) -> Fisher:
    checkpoint, manifest = args.paths
    parsed = parse_checkpoint(compat.load_checkpoint(checkpoint), checkpoint)
    _check(parsed, checkpoint)
    model = SpeechModel(parsed, checkpoint).to(device_of(args.device))
    symbols = _symbols(parsed, manifest, args.labels, checkpoint)
    labels = None if args.from_model else args.labels
    utterances = find_utterances(manifest, model, symbols, labels, args.max_utterances)
    return estimate_fisher(model, utterances, symbols, 1 if args.seed is None else args.seed, progress=True)


def _check(parsed: ParsedCheckpoint, path: str) -> None:
    """A dense recogniser, whose weights are those that training will hold."""
    if parsed.head_state is None or parsed.pooled:
        raise ValueError(
            f"{path} must be a recogniser with a CTC head, but is a {parsed.model_name or parsed.family} without one; fine-tune it first"
        )
    if parsed.scores:
        raise ValueError(
            f"{path} has masks over its weights, which are no weights of their own; multiply them in first: s3distill masks bake {path} "
            "dense.pt"
        )
    if any("gates." in name for name in parsed.extra_state):
        raise ValueError(
            f"{path} has gates that were not pruned yet; cut them first: s3distill prune {path} compact.pt"
        )


def _symbols(parsed: ParsedCheckpoint, manifest: str, labels: str, path: str) -> list[str]:
    """Symbols of the head's rows: the checkpoint's own, or (it may lack them) those of the dictionary beside the manifest."""
    assert parsed.head_state is not None
    num_rows = len(parsed.head_state["weight"])
    symbols, source = parsed.symbols, path
    if symbols is None:
        dictionary = Path(manifest).with_name(f"dict{label_path(manifest, labels).suffix}.txt")
        symbols, source = [*SPECIAL_SYMBOLS, *read_dictionary(dictionary)], str(dictionary)
    if len(symbols) != num_rows:
        raise ValueError(
            f"the dictionary of {source} must have a symbol for each of the {num_rows} rows of the head, but has {len(symbols)} (four of "
            "them special); pass the manifest beside the dictionary of the training"
        )
    return symbols


def _report(fisher: Fisher, output: Path) -> None:
    """The mean of each part, so that it can be seen what the task needs most."""
    rooms: dict[str, list[float]] = {}
    for name, value in fisher.values.items():
        total = rooms.setdefault(_room(name), [0.0, 0])
        total[0] += float(value.double().sum())
        total[1] += value.numel()
    print(f"{'part':<24}{'parameters':>14}{'mean Fisher':>14}")
    for room, (total, number) in rooms.items():
        print(f"{room:<24}{number:>14,}{total / number:>14.3e}")
    print(f"wrote {output}: {fisher.num_utterances} utterances, transcripts: {fisher.targets}")


def _room(name: str) -> str:
    inner = name.removeprefix("w2v_encoder.").removeprefix("w2v_model.")
    parts = inner.split(".")
    return ".".join(parts[:3]) if inner.startswith("encoder.layers.") else parts[0]
