"""The encoder against fairseq's own models with the same weights: our padded batch, their single utterances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq")

import s3distill
from s3distill.encoder.checkpoint import config_from_options, parse_checkpoint
from s3distill.encoder.model import SpeechEncoder
from tests.encoder import checkpoints

TOLERANCE = 1e-5  # of a tensor's largest absolute value, float32


def utterances(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise as loud as speech, zero behind each length: [B, S], and the padding mask [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    source = 0.3 * torch.randn(len(lengths), max(lengths), generator=generator) + 0.02
    return source.masked_fill(padding_mask, 0), padding_mask


@torch.no_grad()
def reference(model: nn.Module, source: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """fairseq's model on one utterance [1, S]: L+1 hidden states, L FFN outputs and the output, each [T, C]."""
    entered: list[Tensor] = []
    results: list[Any] = []
    layers = model.encoder.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _, inputs, output: results.append(output)) for layer in layers]
    out = model.extract_features(source, None, mask=False)
    for hook in hooks:
        hook.remove()
    x = (out["x"] if isinstance(out, dict) else out[0])[0]
    num_frames = len(x)  # fairseq pads frames to an even number inside: [T(+1), 1, C]
    states = [entered[0], *(result[0] for result in results)]
    ffn = [result[1][1] for result in results]
    return [s[:num_frames, 0] for s in states], [f[:num_frames, 0] for f in ffn], x


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst_error(encoder: nn.Module, model: nn.Module, lengths: list[int]) -> float:
    source, padding_mask = utterances(lengths)
    with torch.no_grad():
        out = encoder(source, padding_mask)
    errors = []
    for i, length in enumerate(lengths):
        states, ffn, x = reference(model, source[i : i + 1, :length])
        frames = slice(0, len(x))
        if out.padding_mask is not None:
            assert int((~out.padding_mask[i]).sum()) == len(x)
        assert len(out.hidden_states) == len(states)
        errors += [error(ours[i, frames], theirs) for ours, theirs in zip(out.hidden_states, states, strict=True)]
        errors += [error(ours[i, frames], theirs) for ours, theirs in zip(out.ffn_outputs, ffn, strict=True)]
        errors.append(error(out.x[i, frames], x))
    return max(errors)


REAL_SHAPES = [
    pytest.param(family, shape, marks=[pytest.mark.slow], id=f"{family}-{name}")
    for family in checkpoints.FAMILIES
    for name, shape in (("base", checkpoints.BASE), ("large", checkpoints.LARGE))
]


@pytest.mark.parametrize(("family", "shape"), REAL_SHAPES)
def test_every_layer_is_fairseqs_at_real_shapes(family: str, shape: dict, record_property: Any) -> None:
    cfg = checkpoints.pretraining_config(family, shape)
    model = checkpoints.fill(checkpoints.build_model(cfg, checkpoints.task_state_of(cfg)))
    encoder = SpeechEncoder(config_from_options(cfg["model"], family)).eval()
    encoder.load_encoder_state(dict(model.named_parameters()))
    assert len(encoder.encoder.layers) == (24 if shape else 12)
    worst = worst_error(encoder, model, [16000, 9700])
    record_property("worst_error", worst)
    print(f"{family}: {worst:.2e}")
    assert worst <= TOLERANCE


VARIANTS = [
    {},
    {"layer_norm_first": True, "extractor_mode": "layer_norm", "conv_bias": True},
    {"activation_fn": "relu", "encoder_embed_dim": 16},  # as wide as the conv features: no projection, but in data2vec
]


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("options", VARIANTS, ids=["post_ln", "pre_ln", "no_projection"])
def test_every_layer_is_fairseqs_in_a_small_shape(family: str, options: dict) -> None:
    state, model = checkpoints.pretrained(family, **options)
    parsed = parse_checkpoint(state)
    encoder = SpeechEncoder(parsed.config).eval()
    encoder.load_encoder_state(parsed.encoder_state)
    assert worst_error(encoder, model, [16000, 400, 9000, 12345, 719]) <= TOLERANCE


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_another_weight_gives_another_result(family: str) -> None:
    state, model = checkpoints.pretrained(family)
    parsed = parse_checkpoint(state)
    encoder = SpeechEncoder(parsed.config).eval()
    changed = dict(parsed.encoder_state)
    changed["encoder.layers.1.self_attn.q_proj.weight"] = changed["encoder.layers.1.self_attn.q_proj.weight"] * 1.1
    encoder.load_encoder_state(changed)
    assert worst_error(encoder, model, [9000]) > 10 * TOLERANCE


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_loaded_pretrained_file_gives_fairseqs_layers(family: str, normalize: bool, tmp_path: Path) -> None:
    state, model = checkpoints.pretrained(family, normalize=normalize)
    loaded = s3distill.load(checkpoints.save(state, tmp_path / "pretrained.pt"))
    assert (loaded.family, loaded.normalize, loaded.head) == (family, normalize, None)
    lengths = [9000, 12345, 4000]
    source, _ = utterances(lengths)
    with torch.no_grad():
        out = loaded(source, torch.tensor(lengths))
    assert out.logits is None
    for i, length in enumerate(lengths):
        states, _, x = reference(model, as_fairseq_reads(source[i, :length], normalize))
        for ours, theirs in zip(out.hidden_states, states, strict=True):
            assert error(ours[i, : len(x)], theirs) <= TOLERANCE


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_loaded_fine_tuned_file_gives_fairseqs_layers_and_logits(
    family: str, normalize: bool, tmp_path: Path
) -> None:
    state, model = checkpoints.fine_tuned(family, normalize=normalize)
    loaded = s3distill.load(checkpoints.save(state, tmp_path / "fine_tuned.pt"))
    assert (loaded.family, loaded.normalize) == (family, normalize)
    assert loaded.symbols is not None and tuple(loaded.symbols[4:]) == checkpoints.LETTERS
    lengths = [9000, 12345, 4000]
    source, _ = utterances(lengths)
    with torch.no_grad():
        out = loaded(source, torch.tensor(lengths))
    assert out.logits is not None and out.logits.shape[-1] == 4 + len(checkpoints.LETTERS)
    for i, length in enumerate(lengths):
        single = as_fairseq_reads(source[i, :length], normalize)
        with torch.no_grad():
            logits = model(source=single, padding_mask=None)["encoder_out"][:, 0]  # [T, 1, V]
        states, _, x = reference(model.w2v_encoder.w2v_model, single)
        for ours, theirs in zip(out.hidden_states, states, strict=True):
            assert error(ours[i, : len(x)], theirs) <= TOLERANCE
        assert error(out.logits[i, : len(x)], logits) <= TOLERANCE


def as_fairseq_reads(waveform: Tensor, normalize: bool) -> Tensor:
    """What fairseq's dataset hands to the model: [S] -> [1, S]."""
    return (nn.functional.layer_norm(waveform, waveform.shape) if normalize else waveform)[None]
