"""Writes small fine-tuned CTC checkpoints as fairseq's `wav2vec_ctc` leaves them, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from s3distill import compat
from s3distill.encoder.checkpoint import config_from_options
from s3distill.encoder.model import SpeechEncoder

# a wav2vec 2.0 of 20,000 parameters
SHAPE: dict[str, Any] = {
    "_name": "wav2vec2",
    "extractor_mode": "layer_norm",
    "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2",
    "conv_bias": True,
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "layer_norm_first": True,
    "conv_pos": 8,
    "conv_pos_groups": 2,
}
SYMBOLS = ("A", "B", "|")


def dictionary_of(symbols: Sequence[str]) -> Dictionary:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def write_encoder(path: Path, seed: int = 1, normalize: bool = False, **shape: Any) -> Path:
    """A pre-trained encoder."""
    torch.manual_seed(seed)
    options = {**SHAPE, **shape}
    encoder = SpeechEncoder(config_from_options(options, "wav2vec2"))
    compat.write_checkpoint(path, encoder.state_dict(), options, {"_name": "audio_pretraining", "normalize": normalize})
    return path


def write_ctc(
    path: Path,
    seed: int = 1,
    symbols: Sequence[str] | None = SYMBOLS,
    normalize: bool = False,
    num_outputs: int | None = None,
    **shape: Any,
) -> Path:
    """A `wav2vec_ctc` over such an encoder with a loud head; ``symbols`` None: without its dictionary."""
    torch.manual_seed(seed)
    options = {**SHAPE, **shape}
    encoder = SpeechEncoder(config_from_options(options, "wav2vec2"))
    head = nn.Linear(encoder.config.output_dim, num_outputs or 4 + len(symbols or SYMBOLS))
    nn.init.normal_(head.weight, std=1.0)
    state = {f"w2v_encoder.w2v_model.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"w2v_encoder.proj.{name}": value for name, value in head.state_dict().items()}
    task = {"_name": "audio_pretraining", "data": "", "normalize": normalize}
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        "w2v_args": {"model": options, "task": task},
        "normalize": normalize,
    }
    dictionary = {} if symbols is None else {"target_dictionary": dictionary_of(symbols)}
    compat.write_checkpoint(path, state, model, {"_name": "audio_finetuning", "normalize": normalize}, dictionary)
    return path
