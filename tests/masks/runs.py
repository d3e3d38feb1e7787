"""Writes backbones and trained runs of `wav2vec_ctc_st` for tests of the bank, as fairseq's trainer saves them.

No training: scores, head and what else learns are drawn at random; masks, keys and config are the real model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from torch import Tensor

from s3distill.models.wav2vec_ctc_st import Wav2VecCtcStConfig
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask
from tests.encoder import checkpoints

LETTERS = ("|", "A", "B", "C", "D", "E")
OTHER_LETTERS = ("|", "X", "Y", "Z")
SAMPLES = (9000, 16000, 4000, 12345)
SHAPE = {
    **checkpoints.SMALL,
    "encoder_layers": 2,
    "extractor_mode": "layer_norm",  # stock GroupNorm takes its statistics over the padding, too
    "conv_bias": True,
    "layer_norm_first": True,
}
EVERYTHING = {  # all kinds of modules masked, beside everything that may learn with the masked weights left as they are
    **{"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False},
    **{"trainable_bias": True, "trainable_layer_norm": True},
}


def write_corpus(folder: Path, letters: tuple[str, ...] = LETTERS, seed: int = 0) -> Path:
    """Noise with labels: split ``test``."""
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = ["audio"]
    for i, size in enumerate(SAMPLES):
        sf.write(folder / "audio" / f"{i}.flac", rng.normal(0, 0.1, size).astype(np.float32), 16000)
        lines.append(f"{i}.flac\t{size}")
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "test.ltr").write_text(f"{letters[1]} {letters[2]} |\n" * len(SAMPLES))
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in letters))
    return folder


def write_backbone(path: Path, family: str = "wav2vec2", seed: int = 0, normalize: bool = False, **shape: Any) -> Path:
    state, _ = checkpoints.pretrained(family, {**SHAPE, **shape}, normalize=normalize, seed=seed)
    return checkpoints.save(state, path)


def write_run(
    path: Path,
    backbone: Path,
    corpus: Path,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    **options: Any,
) -> Path:
    """A trained run in ``dtype``; what does not learn is the backbone's, rounded. Saved as float32 (`fairseq.utils.move_to_cpu`)."""
    config = OmegaConf.create(_plain(FairseqConfig()))
    task_options = AudioCtcConfig(data=str(corpus), labels="ltr", normalize=normalize)
    config.task = OmegaConf.create({**_plain(task_options), "_name": "audio_ctc"})
    model_options = Wav2VecCtcStConfig(w2v_path=str(backbone), **options)
    config.model = OmegaConf.create({**_plain(model_options), "_name": "wav2vec_ctc_st"})
    task = AudioCtcTask(config.task)
    model = task.build_model(config.model)
    learn(model, seed)
    weights: dict[str, Tensor] = {
        key: value if key.endswith(".scores") else value.to(dtype).float() for key, value in model.state_dict().items()
    }
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "ctc", "optimizer_name": "adam", "lr_scheduler_state": {}, "num_updates": 1}
        ],
        "task_state": {"target_dictionary": task.target_dictionary},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1}},
        "last_optimizer_state": None,
    }
    return checkpoints.save(state, path)


@torch.no_grad()
def learn(model: Any, seed: int) -> None:
    """Moves everything that learns, and makes the head loud, so that the transcripts of noise are not empty."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".scores"):
            parameter.copy_(noise)
        elif parameter.requires_grad:
            parameter.add_(0.05 * noise)
    model.w2v_encoder.proj.weight.copy_(torch.randn(model.w2v_encoder.proj.weight.shape, generator=generator))


def _plain(options: object) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(options), resolve=False, enum_to_str=True)  # type: ignore[return-value]
