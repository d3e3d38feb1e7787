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
    "prune": ("s3distill.cli.prune", "cut the closed gates out of a trained student"),
    "inspect": ("s3distill.cli.inspect", "parameters, MACs, shapes and speed of a checkpoint"),
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
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command = importlib.import_module(COMMANDS[args.command][0])
    try:
        return int(command.run(args) or 0)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"s3distill {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
