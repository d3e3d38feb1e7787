"""Small models with a decoder for tests: a corpus of noise with texts, stock `wav2vec_seq2seq` and ours, and their checkpoints."""

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

from s3distill.data.manifest import write_manifest
from s3distill.encoder.config import SAMPLE_RATE
from tests.encoder import checkpoints

LETTERS = ("|", "A", "B", "C", "D", "E")
TEXTS = ["A B | C |", "D E A D |", "B E | A | D E |", "C A B |", "E |"]
SAMPLES = [9000, 16000, 4000, 12345, 7001]
DECODER = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 2}
# GroupNorm takes its statistics over the padding in stock fairseq, so that extractors here have LayerNorm
SHAPE = {"encoder_layers": 2, "extractor_mode": "layer_norm", "layer_norm_first": True}


def write_corpus(folder: Path, splits: tuple[str, ...] = ("train", "valid")) -> Path:
    """Noise of 0.25 to 1 s with the texts above, `.ltr` and a dictionary."""
    rng = np.random.default_rng(0)
    for split in splits:
        (folder / split).mkdir(parents=True)
        entries = [(f"{split}/{i}.flac", size) for i, size in enumerate(SAMPLES)]
        for name, size in entries:
            soundfile.write(folder / name, rng.normal(0, 0.1, size), SAMPLE_RATE, subtype="PCM_16")
        write_manifest(folder / f"{split}.tsv", ".", entries)
        (folder / f"{split}.ltr").write_text("\n".join(TEXTS) + "\n")
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    return folder


def write_backbone(path: Path, normalize: bool = False, **shape: Any) -> Path:
    """A pre-trained wav2vec 2.0 with random weights."""
    options = {**checkpoints.SMALL, **SHAPE, **shape}
    return checkpoints.save(checkpoints.pretrained("wav2vec2", options, normalize=normalize)[0], path)


def configuration(data: Path, backbone: Path, name: str, task: dict[str, Any], **model: Any) -> Any:
    """fairseq's whole configuration, as its trainer has it."""
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.dataset.train_subset = "train"
    cfg.task = {"_name": "audio_ctc", "data": str(data), "labels": "ltr", "autoregressive": True, **task}
    cfg.model = {"_name": name, "w2v_path": str(backbone), "apply_mask": False, **DECODER, **model}
    cfg.criterion = {"_name": "cross_entropy"}
    add_defaults(cfg)
    return cfg


def build(
    data: Path, backbone: Path, name: str = "wav2vec_seq2seq_student", task: dict[str, Any] | None = None, **model: Any
) -> tuple[Any, Any, Any]:
    """(task, model, configuration) as `fairseq-hydra-train` builds them."""
    torch.manual_seed(1)
    cfg = configuration(data, backbone, name, task or {}, **model)
    built_task = tasks.setup_task(cfg.task)
    return built_task, built_task.build_model(cfg.model), cfg


@torch.no_grad()
def make_talkative(model: Any) -> None:
    """Larger weights behind the random decoder's attention, so that what it says depends on the audio."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.decoder.named_parameters():
        if "encoder_attn" in name and parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.decoder.embed_out.mul_(4)


def save(path: Path, task: Any, model: Any, cfg: Any) -> Path:
    """A checkpoint with the keys that fairseq's trainer writes."""
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 1}
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": task.state_dict(),
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(state, path)
    return path


def batch(task: Any, split: str = "train", rows: tuple[int, ...] = (0, 1, 2, 3, 4)) -> dict[str, Any]:
    """A batch of the corpus, as the task collates it."""
    if split not in task.datasets:
        task.load_dataset(split)
    dataset = task.dataset(split)
    sample: dict[str, Any] = dataset.collater([dataset[i] for i in rows])
    return sample
