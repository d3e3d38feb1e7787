"""`audio_ctc` end to end: the real `fairseq-generate` on tiny random stock models and generated audio."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

fairseq = pytest.importorskip("fairseq")

from fairseq import options  # noqa: E402
from fairseq.dataclass.configs import FairseqConfig  # noqa: E402
from fairseq_cli import generate  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import s3distill  # noqa: E402, F401
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask  # noqa: E402

LETTERS = ("|", "A", "B", "C", "D", "E")
LABELS = ["A B | C |", "D E A D |", "B E | A | D E |", "C A B |", "E |"]
WORDS = ["AB C", "DEAD", "BE A DE", "CAB", "E"]
SAMPLES = [9000, 16000, 4000, 12345, 7001]
SIZES = dict(
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_feature_layers="[(8,10,5),(8,8,4),(8,4,4),(8,4,4)]",
    conv_pos=8,
    conv_pos_groups=2,
    extractor_mode="layer_norm",  # stock GroupNorm takes its statistics over the padding, too
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    lines = ["audio"]
    for i, size in enumerate(SAMPLES):
        sf.write(folder / "audio" / f"{i}.flac", rng.normal(0, 0.1, size).astype(np.float32), 16000)
        lines.append(f"{i}.flac\t{size}")
    for split in ("test", "words"):
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.ltr").write_text("\n".join(LABELS) + "\n")
    (folder / "words.wrd").write_text("\n".join(["OTHER", *WORDS[1:]]) + "\n")
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    return folder


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: _write_checkpoint(kind, corpus, folder / f"{kind}.pt") for kind in ("wav2vec_ctc", "hubert_ctc")}


def _plain(config: object) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=False, enum_to_str=True)


def _write_checkpoint(kind: str, corpus: Path, path: Path) -> Path:
    """A randomly initialised fine-tuned checkpoint, with the keys that fairseq's trainer writes."""
    from fairseq.models.hubert.hubert import HubertConfig
    from fairseq.models.hubert.hubert_asr import HubertCtcConfig
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
    from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig

    encoder = {"wav2vec_ctc": Wav2Vec2Config, "hubert_ctc": HubertConfig}[kind]()
    for name, value in SIZES.items():
        setattr(encoder, name, value)
    inner_task = {"_name": "audio_pretraining", "data": str(corpus), "normalize": False}
    if kind == "hubert_ctc":
        inner_task = {"_name": "hubert_pretraining", "data": str(corpus), "normalize": False, "label_rate": 50.0, "labels": ["ltr"]}
    model = {"wav2vec_ctc": Wav2Vec2CtcConfig, "hubert_ctc": HubertCtcConfig}[kind]()
    model.w2v_path, model.normalize, model.data = "nowhere.pt", False, str(corpus)
    cfg = OmegaConf.create(_plain(FairseqConfig()))
    cfg.task = OmegaConf.create({**_plain(AudioCtcConfig(data=str(corpus), labels="ltr")), "_name": "audio_ctc"})
    cfg.model = OmegaConf.create({**_plain(model), "_name": kind, "no_pretrained_weights": True})
    inner_model = {**_plain(encoder), "_name": {"wav2vec_ctc": "wav2vec2", "hubert_ctc": "hubert"}[kind]}
    if kind == "hubert_ctc":
        inner_model["label_rate"] = 50.0
    cfg.model.w2v_args = OmegaConf.create({"model": inner_model, "task": inner_task, "common": {"fp16": False, "tpu": False, "seed": 1}})
    task = AudioCtcTask(cfg.task)
    torch.manual_seed(1)
    built = task.build_model(cfg.model)
    with torch.no_grad():
        built.w2v_encoder.proj.weight.mul_(20)  # random frames then differ, so that the transcripts are not empty
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": built.state_dict(),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "CtcCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}],
        "task_state": {"target_dictionary": task.target_dictionary},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(state, path)
    return path


def _generate(corpus: Path, model: str, results: Path | None = None, batch_size: int = 3, subset: str = "test", *more: str):
    arguments = [str(corpus), "--task", "audio_ctc", "--labels", "ltr", "--path", model, "--gen-subset", subset, "--cpu"]
    arguments += ["--batch-size", str(batch_size), "--num-workers", "0", "--scoring", "s3_wer", "--post-process", "letter"]
    arguments += ["--results-path", str(results)] if results else []
    parser = options.get_generation_parser()
    parser.add_argument("--arch", "-a", default="wav2vec2")
    return generate.main(options.parse_args_and_arch(parser, [*arguments, *more]))
