"""Models of `transformers` with random weights, their folders, and WavLM's files in the released layout.

`released_wavlm` needs no `transformers`; the rest skips a test where that is not installed (extra ``test-hf``).
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import config_from_options
from tests.encoder import checkpoints

MODEL_TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio")
_CLASSES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "data2vec-audio": "Data2VecAudio"}

Options = dict[str, Any]

# config.json of small models: widths of a few dozen, frames of 20 ms as in the released models
SMALL: Options = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    **{"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4},
}
LARGE: Options = {
    **{"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
}
# what the pre-LN models of a family have; data2vec has none in `transformers`
PRE_LN: Options = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
VOCAB = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "A": 7}

# the options in a released file that shape the encoder; WavLM Base and Base+, and Large
BASE_CFG: Options = {
    **{"extractor_mode": "default", "encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072},
    **{"encoder_attention_heads": 12, "activation_fn": "gelu", "layer_norm_first": False, "conv_bias": False},
    **{"conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", "feature_grad_mult": 0.1},
    **{"normalize": False, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.1},
    **{"encoder_layerdrop": 0.05, "dropout_features": 0.1, "mask_length": 10, "mask_prob": 0.8},
    **{"mask_selection": "static", "mask_other": 0.0, "no_mask_overlap": False, "mask_min_space": 1},
    **{"mask_channel_length": 10, "mask_channel_prob": 0.0, "mask_channel_selection": "static"},
    **{"mask_channel_other": 0.0, "no_mask_channel_overlap": False, "mask_channel_min_space": 1},
    **{"conv_pos": 128, "conv_pos_groups": 16, "relative_position_embedding": True, "num_buckets": 320},
    **{"max_distance": 800, "gru_rel_pos": True},
}
LARGE_CFG: Options = BASE_CFG | {
    **{"extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True, "feature_grad_mult": 1.0},
    **{"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096, "encoder_attention_heads": 16},
}
SMALL_CFG: Options = BASE_CFG | checkpoints.SMALL


@functools.cache
def transformers() -> Any:
    """The library, or the test is skipped; its audio code is kept from torchaudio, whose wheels do not load beside a CPU torch."""
    there = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = None  # type: ignore[assignment]
    try:
        module = pytest.importorskip("transformers")
        module.utils.is_torchaudio_available.cache_clear()  # fairseq may have imported it before
        for name in _CLASSES.values():
            assert getattr(module, f"{name}ForCTC")
    finally:
        del sys.modules["torchaudio"]
        if there is not None:
            sys.modules["torchaudio"] = there
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def build(model_type: str, shape: Options = SMALL, ctc: bool = False, seed: int = 0, **options: Any) -> nn.Module:
    """A model with random weights, biases, norms and position bias included, so that nothing is trivially right."""
    library, name = transformers(), _CLASSES[model_type]
    data2vec = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
    small = data2vec if model_type == "data2vec-audio" else {"num_conv_pos_embeddings": 16}
    options = (small if shape.get("hidden_size", 768) < 128 else {}) | shape | options
    config = getattr(library, f"{name}Config")(**{"vocab_size": len(VOCAB), **options})
    with mock.patch.multiple(Tensor, normal_=_keep, uniform_=_keep):  # large shapes spend seconds on drawing weights
        model = getattr(library, f"{name}{'ForCTC' if ctc else 'Model'}")(config)
    checkpoints.fill(model, seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("weight.original0"):  # the norms of the positional conv, near those of its directions
                norm = dict(model.named_parameters())[key[:-1] + "1"].norm(dim=(0, 1), keepdim=True)
                parameter.copy_(norm * (1 + 0.1 * parameter))
            elif key.endswith("rel_attn_embed.weight"):
                parameter.mul_(3 * parameter.shape[1] ** 0.5)
    return model.eval()


def _keep(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def write(
    folder: Path, model: nn.Module, normalize: bool = False, vocab: Options | None = None, **options: Any
) -> Path:
    """A folder as `transformers` writes it, with the feature extractor's file and, of CTC models, the vocabulary."""
    model.save_pretrained(folder, **options)
    transformers().Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    if hasattr(model, "lm_head") or vocab is not None:
        (folder / "vocab.json").write_text(json.dumps(VOCAB if vocab is None else vocab))
    return folder


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Changes values in one of a folder's JSON files."""
    contents = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(contents | changes))
    return folder


@torch.no_grad()
def reference(model: nn.Module, source: Tensor) -> tuple[list[Tensor], Tensor]:
    """`transformers` on one utterance [1, S]: L+1 hidden states, and logits of a CTC model or the output; each [T, C]."""
    base = model.base_model if hasattr(model, "lm_head") else model
    entered: list[Tensor] = []
    left: list[Tensor] = []
    layers = base.encoder.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].clone()))]
    hooks += [layer.register_forward_hook(lambda _, inputs, output: left.append(_first(output))) for layer in layers]
    out = model(source)
    for hook in hooks:
        hook.remove()
    result = out.logits if hasattr(model, "lm_head") else out.last_hidden_state
    return [state[0] for state in (*entered, *left)], result[0]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def released_wavlm(cfg: Options = SMALL_CFG, seed: int = 0, **options: Any) -> dict[str, Any]:
    """What `torch.load` gives of a released WavLM file, with random weights."""
    cfg = {**cfg, **options}
    encoder = checkpoints.fill(SpeechEncoder(config_from_options(cfg, "wavlm")), seed)
    state = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    bias = state.pop("encoder.relative_attention_bias.weight")
    state["encoder.layers.0.self_attn.relative_attention_bias.weight"] = bias * 3 * bias.shape[1] ** 0.5
    return {"cfg": cfg, "model": state}


# released name -> name in `transformers`, written down apart from the package's own table
_RELEASED = (
    ("encoder.layers.0.self_attn.relative_attention_bias.weight", "encoder.layers.0.attention.rel_attn_embed.weight"),
    (".self_attn.grep_linear.", ".attention.gru_rel_pos_linear."),
    (".self_attn.grep_a", ".attention.gru_rel_pos_const"),
    (".self_attn_layer_norm.", ".layer_norm."),
    (".self_attn.", ".attention."),
    (".fc1.", ".feed_forward.intermediate_dense."),
    (".fc2.", ".feed_forward.output_dense."),
    ("encoder.pos_conv.0.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    ("encoder.pos_conv.0.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    ("encoder.pos_conv.0.bias", "encoder.pos_conv_embed.conv.bias"),
    ("post_extract_proj.", "feature_projection.projection."),
    ("mask_emb", "masked_spec_embed"),
)


def into_transformers(state: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """Loads the weights of a released file into a `WavLMModel`, all of them and nothing else."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("layer_norm."):
            name = f"feature_projection.{name}"
        elif name.startswith("feature_extractor."):
            parts = name.split(".")  # conv_layers.N.0.weight, .2.weight (GroupNorm) or .2.1.weight (LayerNorm)
            kind = "conv" if parts[3] == "0" else "layer_norm"
            name = ".".join([*parts[:3], kind, parts[-1]])
        else:
            for old, new in _RELEASED:
                if old in name:
                    name = name.replace(old, new)
                    break
        renamed[name] = value
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def wavlm_for(cfg: Options) -> nn.Module:
    """A `WavLMModel` of the shape of a released file's options, weights unset."""
    convs = [tuple(c) for c in eval(cfg["conv_feature_layers"])]
    return build(
        "wavlm",
        {
            **{"hidden_size": cfg["encoder_embed_dim"], "num_hidden_layers": cfg["encoder_layers"]},
            **{
                "num_attention_heads": cfg["encoder_attention_heads"],
                "intermediate_size": cfg["encoder_ffn_embed_dim"],
            },
            **{"conv_dim": [c[0] for c in convs], "conv_kernel": [c[1] for c in convs]},
            **{"conv_stride": [c[2] for c in convs], "conv_bias": cfg["conv_bias"]},
            **{"feat_extract_norm": "layer" if cfg["extractor_mode"] == "layer_norm" else "group"},
            **{"do_stable_layer_norm": cfg["layer_norm_first"], "num_conv_pos_embeddings": cfg["conv_pos"]},
            **{"num_conv_pos_embedding_groups": cfg["conv_pos_groups"], "num_buckets": cfg["num_buckets"]},
            **{"max_bucket_distance": cfg["max_distance"]},
        },
    )
