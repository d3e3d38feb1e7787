"""Writes a compact student, as `s3distill prune` leaves it: layers with fewer heads, narrow FFNs, and sub-layers that are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import LayerConfig
from s3distill.encoder.model import SpeechEncoder
from tests.encoder import checkpoints

LAYERS = (LayerConfig(4, 8, 48), LayerConfig(1, 8, 20), LayerConfig(4, 8, 9, attention=False), LayerConfig(0, 8, 48))


def write_compact_student(path: Path, more: Mapping[str, Tensor] | None = None) -> Path:
    """A pruned `ssl_student`; ``more`` tensors beside the encoder's."""
    config = parse_checkpoint(checkpoints.pretrained("hubert", checkpoints.SMALL)[0]).config
    config = dataclasses.replace(config, layers=LAYERS)
    encoder = checkpoints.fill(SpeechEncoder(config))
    options = {"_name": "ssl_student", "encoder": config.to_json()}
    compat.write_checkpoint(path, {**encoder.state_dict(), **(more or {})}, options, {"normalize": False})
    return path
