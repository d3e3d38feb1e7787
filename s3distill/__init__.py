"""s3distill: small and fast self-supervised speech models, as a fairseq plugin (``common.user_dir=s3distill``).

Importing the package registers its tasks, models, criterions and optimizers where fairseq is installed, and makes stock
fairseq read its checkpoints safely on torch >= 2.6. `load` reads any supported checkpoint and needs no fairseq.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from s3distill import compat

if TYPE_CHECKING:
    from s3distill.encoder.speech_model import SpeechModel

__version__ = "0.1.0"
__all__ = ["load"]


def load(path: str | os.PathLike[str], device: str = "cpu") -> SpeechModel:
    """Loads a checkpoint of s3distill or fairseq (teacher, student, compact, fine-tuned) for inference.

        model = s3distill.load("compact.pt")
        out = model(waveforms, lengths)  # [B, S] float32 at 16 kHz, [B] or None

    Returns:
        A `SpeechModel` in evaluation mode, float32.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, refused (see `compat.load_checkpoint`) or of an unsupported model.
    """
    from s3distill.encoder.checkpoint import parse_checkpoint
    from s3distill.encoder.speech_model import SpeechModel

    return SpeechModel(parse_checkpoint(compat.load_checkpoint(path), str(path)), str(path)).to(device)


if compat.fairseq_usable():
    compat.install()
    compat.import_shells()
