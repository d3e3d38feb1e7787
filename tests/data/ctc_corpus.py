"""A corpus of four short utterances of noise with letters, for tests of recognisers with `checkpoints.LETTERS`."""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch

from s3distill.data.manifest import write_manifest
from tests.encoder import checkpoints

TEXTS = ["A T E", "T T | O", "E", "O A |"]
SAMPLES = [4000, 5200, 3100, 4700]
SHAPE = {**checkpoints.SMALL, "encoder_layers": 2}  # of the recognisers


def write_corpus(folder: Path, split: str = "train") -> Path:
    """Returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate(SAMPLES):
        soundfile.write(folder / f"{i}.flac", (0.2 * torch.randn(length, generator=generator)).numpy(), 16000)
    write_manifest(folder / f"{split}.tsv", ".", [(f"{i}.flac", length) for i, length in enumerate(SAMPLES)])
    (folder / f"{split}.ltr").write_text("".join(f"{text}\n" for text in TEXTS))
    return folder / f"{split}.tsv"


def write_dictionary(folder: Path) -> None:
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in checkpoints.LETTERS))
