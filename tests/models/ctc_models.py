"""Writes small fine-tuned CTC checkpoints as fairseq's `wav2vec_ctc` leaves them, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import nn

from s3distill import compat
from s3distill.criterions.ctc_distill import CtcDistillConfig
from s3distill.encoder.checkpoint import config_from_options
from s3distill.encoder.model import SpeechEncoder
from s3distill.models.wav2vec_ctc_student import Wav2VecCtcStudentConfig
from s3distill.tasks.audio_ctc_distill import AudioCtcDistillConfig, AudioCtcDistillTask

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


def write_dictionary(folder: Path, symbols: Sequence[str] = SYMBOLS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    return folder


def build(
    data: Path,
    model: dict[str, Any] | None = None,
    criterion: dict[str, Any] | None = None,
    **task_options: Any,
) -> tuple[Any, Any, Any]:
    """Task, model and criterion of a CTC distillation, as fairseq's command builds them."""
    task_cfg = _whole(AudioCtcDistillConfig, {"data": str(data), "labels": "ltr", **task_options}, "audio_ctc_distill")
    common = {"normalize": bool(task_options.get("normalize", False)), "seed": 1, "max_update": 10}
    common |= {"data": str(data), "ddp_backend": "legacy_ddp"}
    model_cfg = _whole(Wav2VecCtcStudentConfig, {**common, **(model or {})}, "wav2vec_ctc_student")
    values = {"sentence_avg": False, "zero_infinity": True, **(criterion or {})}
    criterion_cfg = _whole(CtcDistillConfig, values, "ctc_distill")
    task = AudioCtcDistillTask(task_cfg)
    torch.manual_seed(0)
    built = task.build_model(model_cfg)
    return task, built, task.build_criterion(criterion_cfg)


def _whole(config: type, values: dict[str, Any], name: str) -> Any:
    options = OmegaConf.to_container(OmegaConf.structured(config), resolve=False, enum_to_str=True)
    return OmegaConf.create({**options, **values, "_name": name})  # type: ignore[dict-item]


def batch(lengths: Sequence[int], labels: Sequence[Sequence[int]], seed: int = 0) -> dict[str, Any]:
    """A collated sample of noise; ``labels`` are indices of symbols."""
    generator = torch.Generator().manual_seed(seed)
    waves = [torch.randn(16000, generator=generator)[:n] for n in lengths]
    return collate(range(len(lengths)), waves, labels)


def collate(ids: Sequence[int], waves: Sequence[torch.Tensor], labels: Sequence[Sequence[int]]) -> dict[str, Any]:
    lengths = torch.tensor([len(wave) for wave in waves])
    source = nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    targets = [torch.tensor(label) for label in labels]
    return {
        "id": torch.tensor(list(ids)),
        "net_input": {"source": source, "padding_mask": torch.arange(source.shape[1]) >= lengths[:, None]},
        "target": nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=1),
        "target_lengths": torch.tensor([len(label) for label in labels]),
        "ntokens": sum(len(label) for label in labels),
    }
