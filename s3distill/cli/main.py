"""The `s3distill` command: reads the command line, hands over to one module per command, turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

# name -> (module, one-line help); a module is imported only when its command runs, so `s3distill --help` is instant
COMMANDS = {
    "doctor": ("s3distill.cli.doctor", "versions, devices, fused kernels, and what is missing with its remedy"),
    "path": ("s3distill.cli.path", "print the folder to pass as common.user_dir"),
    "demo-data": ("s3distill.cli.demo_data", "synthesise a small speech corpus with espeak-ng"),
    "manifest": ("s3distill.cli.manifest", "write wav2vec manifests for a folder of audio"),
    "check": ("s3distill.cli.check", "validate a manifest with its audio, labels and dictionary"),
    "train": ("s3distill.cli.train", "fairseq-hydra-train, with devices, paths, options and manifests checked first"),
    "prune": ("s3distill.cli.prune", "cut the closed gates out of a trained student"),
    "keep-heads": ("s3distill.cli.keep_heads", "make the predictions of a student's heads its output"),
    "layer-weights": (
        "s3distill.cli.layer_weights",
        "which of the teacher's layers a model reads that keeps its heads",
    ),
    "inspect": ("s3distill.cli.inspect", "parameters, MACs, shapes and speed of a checkpoint"),
    "report": ("s3distill.cli.report", "runs or a sweep beside each other: error rate against size and speed"),
    "latency-table": (
        "s3distill.cli.latency_table",
        "time the parts of an encoder here, for model.prune_measure=latency",
    ),
    "pseudo-label": ("s3distill.cli.pseudo_label", "transcribe audio with a teacher, and filter what it wrote"),
    "convert": (
        "s3distill.cli.convert",
        "Hugging Face folders and WavLM files to fairseq checkpoints, students to folders",
    ),
    "tune-lm": ("s3distill.cli.tune_lm", "weights of a language model and of words, swept on a validation set"),
    "fisher": ("s3distill.cli.fisher", "which weights a recogniser needs, for learning without forgetting"),
    "old-head": ("s3distill.cli.old_head", "a later run's encoder with the head of an old task"),
    "masks": ("s3distill.cli.masks", "banks of masks: one backbone for many languages"),
    "quickstart": ("s3distill.cli.quickstart", "the whole chain on demo speech, with a report"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status (0 done, 1 faults were found, 2 wrong input)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="s3distill", description="Small and fast speech models, as a fairseq plugin.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv and argv[0] == name:
            importlib.import_module(module_name).add_arguments(subparser)
    args = _parse(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command = importlib.import_module(COMMANDS[args.command][0])
    try:
        return int(command.run(args) or 0)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"s3distill {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """argparse would take ``--config-dir`` of `s3distill train --config-dir ...` for an option of its own."""
    command = argv[0] if argv else ""
    if command in COMMANDS and not {"-h", "--help"} & set(argv[1:2]):
        module = importlib.import_module(COMMANDS[command][0])
        if getattr(module, "TAKES_ANY_ARGUMENTS", False):
            return argparse.Namespace(command=command, arguments=argv[1:])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
