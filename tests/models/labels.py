"""Toy classification for tests: tones of three pitches, a small random backbone, and runs of `wav2vec_label_st` over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from fairseq import tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from omegaconf import OmegaConf
from torch import Tensor, nn

from s3distill.data.manifest import write_manifest
from s3distill.encoder.config import SAMPLE_RATE
from tests.encoder import checkpoints

PITCHES = {"low": 150, "middle": 700, "high": 3000}  # Hz
CLASSES = sorted(PITCHES)


def write_corpus(folder: Path, num_train: int = 24, num_valid: int = 7, seed: int = 1) -> Path:
    """Tones with noise, 0.2 to 0.5 s; train and valid with `.pitch` labels in turn, and no dictionary."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", num_train), ("valid", num_valid)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries, labels = [], []
        for i in range(number):
            num_samples = int(rng.integers(SAMPLE_RATE // 5, SAMPLE_RATE // 2))
            labels.append(list(PITCHES)[i % len(PITCHES)])
            phase = 2 * np.pi * PITCHES[labels[-1]] * np.arange(num_samples) / SAMPLE_RATE
            samples = 0.3 * np.sin(phase + rng.uniform(0, 6)) + 0.01 * rng.standard_normal(num_samples)
            entries.append((f"{split}/{i:03d}.flac", num_samples))
            soundfile.write(folder / entries[-1][0], samples, SAMPLE_RATE, subtype="PCM_16")
        write_manifest(folder / f"{split}.tsv", ".", entries)
        (folder / f"{split}.pitch").write_text("".join(f"{label}\n" for label in labels))
    return folder


def write_backbone(path: Path, family: str = "wav2vec2", normalize: bool = True, **shape: Any) -> Path:
    """A pre-trained checkpoint with random weights."""
    options = {**checkpoints.SMALL, "encoder_layers": 2, **shape}
    return checkpoints.save(checkpoints.pretrained(family, options, normalize=normalize)[0], path)


def configuration(
    data: Path, backbone: Path, normalize: bool = True, name: str = "wav2vec_label_st", **model: Any
) -> Any:
    """fairseq's whole configuration, as its trainer has it."""
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.checkpoint.save_dir = str(data / "no_run")
    task, labels = ("audio_labels", "pitch") if name == "wav2vec_label_st" else ("audio_ctc", "ltr")
    cfg.task = {"_name": task, "data": str(data), "labels": labels, "normalize": normalize}
    cfg.model = {"_name": name, "w2v_path": str(backbone), "data": str(data), "normalize": normalize, **model}
    cfg.criterion = {"_name": "label_cross_entropy"}
    add_defaults(cfg)
    return cfg


def build(data: Path, backbone: Path, **options: Any) -> tuple[Any, Any, Any]:
    """(task, model, configuration) as `fairseq-hydra-train` builds them."""
    torch.manual_seed(1)
    cfg = configuration(data, backbone, **options)
    task = tasks.setup_task(cfg.task)
    return task, task.build_model(cfg.model), cfg


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> nn.Module:
    """Random scores, head and biases, so that nothing is at its start any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((".scores", ".bias")) or ".proj." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def write_run(path: Path, task: Any, model: Any, cfg: Any) -> Path:
    """A checkpoint with the keys of fairseq's trainer."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    state = checkpoints.checkpoint_of(model, plain)
    return checkpoints.save({**state, "task_state": task.state_dict()}, path)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
