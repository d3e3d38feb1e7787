"""`s3distill path`: the folder that fairseq takes as ``common.user_dir``, whatever the current folder is."""

from __future__ import annotations

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`path` takes no options."""


def package_path() -> str:
    """The package's folder, absolute, spelt as Python imported it: fairseq compares the spelling, so links stay unresolved."""
    return os.path.abspath(next(iter(sys.modules["s3distill"].__path__)))


def run(args: argparse.Namespace) -> int:
    print(package_path())
    return 0
