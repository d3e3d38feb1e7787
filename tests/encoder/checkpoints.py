"""Makes fairseq checkpoints of the real layouts with random weights, and the fairseq models that belong to them.

Shared by the tests of the encoder, of loading and of the shells: `pretrained` and `fine_tuned` give what fairseq's
trainer writes today (``cfg`` is a plain dict); `with_dictconfig` and `with_args` turn that into the older layouts.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import fairseq.examples.data2vec.models.data2vec_audio as data2vec
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.hubert.hubert import HubertConfig
from fairseq.models.hubert.hubert_asr import HubertCtcConfig
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from omegaconf import OmegaConf
from torch import Tensor, nn

import s3distill  # noqa: F401  repairs what stops stock fairseq from building hubert_ctc

FAMILIES = ("wav2vec2", "hubert", "data2vec_audio")
LETTERS = ("|", "E", "T", "A", "O")

Options = dict[str, Any]
State = dict[str, Any]

# widths of a few dozen, frames of 20 ms as in the released models
SMALL: Options = {
    "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
BASE: Options = {}  # fairseq's defaults: 12 x 768, GroupNorm extractor, post-LN
LARGE: Options = {
    "encoder_layers": 24,
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
}
_CONFIGS = {"wav2vec2": Wav2Vec2Config, "hubert": HubertConfig, "data2vec_audio": data2vec.Data2VecAudioConfig}
# what the released models of a family set in every size
_FAMILY_OPTIONS: dict[str, Options] = {
    "wav2vec2": {"quantize_targets": True, "final_dim": 256, "latent_vars": 320},
    "hubert": {"final_dim": 256},
    "data2vec_audio": {"extractor_mode": "layer_norm", "conv_pos": 95, "pos_conv_depth": 5, "average_top_k_layers": 8},
}
_SMALL_HEADS: dict[str, Options] = {
    "wav2vec2": {"final_dim": 16, "latent_vars": 8},
    "hubert": {"final_dim": 16},
    "data2vec_audio": {"conv_pos": 15, "pos_conv_depth": 3, "average_top_k_layers": 2},
}


def make_dictionary(symbols: tuple[str, ...] = LETTERS) -> Dictionary:
    """fairseq's dictionary: four special symbols, then ``symbols``."""
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def pretraining_config(family: str, shape: Options = SMALL, normalize: bool = False, **options: Any) -> Options:
    """The whole config of a pre-training run, as a plain dict with nothing unresolved."""
    heads = _SMALL_HEADS[family] if shape.get("encoder_embed_dim", 768) < 128 else {}
    model = {**_FAMILY_OPTIONS[family], **shape, **heads, **options}
    if family == "hubert":
        task: Any = HubertPretrainingConfig(data="", label_rate=50.0, labels=["km"], normalize=normalize)
        return _whole_config("hubert", HubertConfig, model, "hubert_pretraining", task, "hubert")
    criterion = "wav2vec" if family == "wav2vec2" else "model"
    task = AudioPretrainingConfig(data="", normalize=normalize)
    return _whole_config(family, _CONFIGS[family], model, "audio_pretraining", task, criterion)


def fine_tuning_config(pretraining: Options, normalize: bool = False, **options: Any) -> Options:
    """The whole config of CTC fine-tuning: ``hubert_ctc`` for HuBERT, ``wav2vec_ctc`` for the others."""
    model = {"w2v_path": "gone.pt", "data": "", "layerdrop": 0.0, **options}
    if pretraining["model"]["_name"] == "hubert":
        task: Any = HubertPretrainingConfig(
            data="", labels=["ltr"], fine_tuning=True, single_target=True, label_rate=-1.0, normalize=normalize
        )
        cfg = _whole_config("hubert_ctc", HubertCtcConfig, model, "hubert_pretraining", task, "ctc")
    else:
        task = AudioFinetuningConfig(data="", labels="ltr", normalize=normalize)
        cfg = _whole_config("wav2vec_ctc", Wav2Vec2CtcConfig, model, "audio_finetuning", task, "ctc")
    cfg["model"]["w2v_args"] = copy.deepcopy(pretraining)
    return cfg


def _whole_config(name: str, schema: type, options: Options, task_name: str, task: Any, criterion: str) -> Options:
    """Options in fairseq's own config, then what its trainer does to them: resolved containers, enums as strings."""
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.task = OmegaConf.structured(task)
    cfg.task._name = task_name
    cfg.model = OmegaConf.merge(OmegaConf.structured(schema), options)
    cfg.model._name = name
    cfg.criterion = {"_name": criterion}
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def build_model(cfg: Options, task_state: State | None = None) -> nn.Module:
    """fairseq's own model of a config with unset weights (see `fill`), built as `load_model_ensemble_and_task` does."""
    config = OmegaConf.create(copy.deepcopy(cfg), flags={"allow_objects": True})
    task = tasks.setup_task(config.task, from_checkpoint=True)
    task.load_state_dict(task_state or {})
    with mock.patch.multiple(Tensor, normal_=_keep, uniform_=_keep):  # large shapes spend seconds on drawing weights
        return task.build_model(config.model, from_checkpoint=True).eval()


def _keep(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that keeps activations near 1, all biases and norms included; the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1_000_003, generator=generator)  # a prime, so that rows of one matrix differ
    start = 0
    for name, parameter in model.named_parameters():
        if name.endswith("weight_g"):
            continue
        count = parameter.numel()
        repeats = math.ceil((start + count) / len(noise))
        values = noise.repeat(repeats)[start : start + count] if repeats > 1 else noise[start : start + count]
        start = (start + count) % len(noise)
        values = values.view(parameter.shape)
        if parameter.dim() >= 2:
            parameter.copy_(values * max(1.0, count / max(1, parameter.shape[0])) ** -0.5)
        else:
            parameter.copy_(0.1 * values + float(name.endswith(".weight")))  # norms' weights are near 1
    for module in model.modules():
        if hasattr(module, "weight_g"):  # wav2vec 2.0's positional conv
            norm = module.weight_v.norm(dim=(0, 1), keepdim=True)
            module.weight_g.copy_(norm * (1 + 0.1 * noise[: norm.numel()].view(norm.shape)))
    return model


def task_state_of(cfg: Options) -> State:
    """What fairseq's task puts into a checkpoint: dictionaries."""
    name = cfg["model"]["_name"]
    if name == "hubert":
        return {"dictionaries": [make_dictionary(tuple(map(str, range(6))))]}
    if name == "hubert_ctc":
        return {"dictionaries": [None], "target_dictionary": make_dictionary()}
    return {"target_dictionary": make_dictionary()} if name == "wav2vec_ctc" else {}


def checkpoint_of(model: nn.Module, cfg: Options, num_updates: int = 100) -> State:
    """The state that `fairseq.trainer.Trainer.state_dict` gives."""
    return {
        "args": None,
        "cfg": copy.deepcopy(cfg),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CtcCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": 1.5},
                "num_updates": num_updates,
            }
        ],
        "task_state": task_state_of(cfg),
        "extra_state": {
            "metrics": [(0, "train", {"loss": 1.0})],
            "previous_training_time": 12.5,
            "train_iterator": {"epoch": 2, "iterations_in_epoch": 0, "shuffle": True, "len": 50},
            "val_loss": 1.25,
        },
        "last_optimizer_state": {
            "state": {0: {"step": 100, "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4}],
        },
    }


def pretrained(
    family: str, shape: Options = SMALL, normalize: bool = False, seed: int = 0, **options: Any
) -> tuple[State, nn.Module]:
    """A pre-training checkpoint, all pre-training modules included, and fairseq's model with its weights."""
    cfg = pretraining_config(family, shape, normalize, **options)
    model = fill(build_model(cfg, task_state_of(cfg)), seed)
    if family == "data2vec_audio":
        model.set_num_updates(1)  # makes its moving average, which stands in checkpoints as `_ema`
    return checkpoint_of(model, cfg), model


def fine_tuned(
    family: str, shape: Options = SMALL, normalize: bool = False, seed: int = 0, **options: Any
) -> tuple[State, nn.Module]:
    """A CTC fine-tuned checkpoint with its dictionary, and fairseq's model with its weights."""
    cfg = fine_tuning_config(pretraining_config(family, shape, normalize, **options), normalize)
    model = fill(build_model(cfg, task_state_of(cfg)), seed)
    return checkpoint_of(model, cfg), model


def with_dictconfig(state: State) -> State:
    """The layout of fairseq 0.10 to 0.12: ``cfg`` is an omegaconf `DictConfig`."""
    return {**state, "cfg": OmegaConf.create(state["cfg"], flags={"allow_objects": True})}


def with_args(state: State) -> State:
    """The layout before hydra: one flat `argparse.Namespace`, nested as ``w2v_args`` when fine-tuned."""
    return {**{k: v for k, v in state.items() if k != "cfg"}, "args": _namespace(state["cfg"])}


def _namespace(cfg: Options) -> argparse.Namespace:
    flat = {k: v for group in ("common", "dataset", "optimization", "checkpoint") for k, v in cfg[group].items()}
    flat.update({k: v for k, v in cfg["task"].items() if k != "_name"})
    flat.update({k: v for k, v in cfg["model"].items() if k != "_name"})
    flat.update(arch=cfg["model"]["_name"], task=cfg["task"]["_name"], criterion=cfg["criterion"]["_name"])
    flat.update(optimizer="adam", lr_scheduler="fixed", distributed_world_size=1, ddp_backend="legacy_ddp")
    if isinstance(flat.get("w2v_args"), dict):
        flat["w2v_args"] = _namespace(flat["w2v_args"])
    return argparse.Namespace(**{k: v for k, v in flat.items() if k != "_name" and not isinstance(v, dict)})


def save(state: State, path: Path, as_zip: bool = True) -> Path:
    """`torch.save` in today's zip format, or in the one before torch 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    return path
