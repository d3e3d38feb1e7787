"""s3distill: small and fast self-supervised speech models, as a fairseq plugin (``common.user_dir=s3distill``).

Importing the package registers its tasks, models, criterions and optimizers where fairseq is installed, and makes stock
fairseq read its checkpoints safely on torch >= 2.6. `load` reads any supported checkpoint and needs no fairseq.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from s3distill import compat

if TYPE_CHECKING:
    from s3distill.encoder.speech_model import SpeechModel
    from s3distill.masks.masked_model import MaskedModel

__version__ = "0.1.0"
__all__ = ["MaskedModel", "load"]


def load(path: str | os.PathLike[str], device: str = "cpu") -> SpeechModel:
    """Loads a checkpoint of s3distill, fairseq or WavLM (teacher, student, compact, fine-tuned) for inference.

    Or a folder: of Hugging Face's transformers (wav2vec2, hubert, wavlm, data2vec-audio), or of `s3distill convert`.

        model = s3distill.load("compact.pt")
        out = model(waveforms, lengths)  # [B, S] float32 at 16 kHz, [B] or None

    Returns:
        A `SpeechModel` in evaluation mode, float32.
    Raises:
        FileNotFoundError: there is no such file, or the folder lacks some.
        ValueError: it is corrupt, refused (see `compat.load_checkpoint`) or of an unsupported model.
    """
    from s3distill.encoder.checkpoint import parse_checkpoint
    from s3distill.encoder.speech_model import SpeechModel

    return SpeechModel(parse_checkpoint(compat.load_checkpoint(path), str(path)), str(path)).to(device)


def __getattr__(name: str) -> Any:
    if name == "MaskedModel":  # late, like everything that brings the encoder along
        return _masked_model()
    raise AttributeError(f"module 's3distill' has no attribute {name!r}")


@functools.cache
def _masked_model() -> Any:
    from s3distill.masks import masked_model

    class MaskedModel(masked_model.MaskedModel):
        __doc__ = masked_model.MaskedModel.__doc__

        @classmethod
        def load(cls, backbone: Any, bank: Any, source: str = "the backbone") -> MaskedModel:
            """As in the core, with the path of a checkpoint as ``backbone`` too."""
            if isinstance(backbone, str | os.PathLike):
                return super().load(load(backbone), bank, os.fspath(backbone))
            return super().load(backbone, bank, source)

    return MaskedModel


if compat.fairseq_usable():
    compat.install()
    compat.import_shells()
