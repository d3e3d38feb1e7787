"""Students of some of a teacher's layers: which, and that they compute what the teacher's layers compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.layer_choice import parse_layer_choice, take_extractor, take_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.heads import HeadsConfig


def config(**changes: object) -> EncoderConfig:
    values = {
        "conv_layers": (ConvLayerConfig(8, 10, 5), ConvLayerConfig(12, 3, 2)),
        "embed_dim": 16,
        "layers": uniform_layers(6, 2, 8, 24),
        "pos_conv_kernel": 4,
        "pos_conv_groups": 2,
    }
    return EncoderConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("first:2", (0, 1)),
        ("first:12", tuple(range(12))),
        ("every:4", (0, 4, 8)),
        ("every:5", (0, 5, 10)),
        ("every:1", tuple(range(12))),
        ("0,4,8", (0, 4, 8)),
        ("11, 3", (11, 3)),
        ("7", (7,)),
    ],
)
def test_choices(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layer_choice(text, 12) == layers


@pytest.mark.parametrize("text", ["", "last:2", "first:", "first:two", "every:0", "0;4", "0,x", "every:1.5"])
def test_what_reads_like_no_choice(text: str) -> None:
    with pytest.raises(ValueError, match="`init_layers` must read like 'first:2', 'every:4', '0,4,8' or 'none'"):
        parse_layer_choice(text, 12)


@pytest.mark.parametrize(
    ("text", "named"), [("first:13", r"layers \[12\]"), ("0,12,-1", r"\[12, -1\]"), ("first:0", "no layer")]
)
def test_layers_that_there_are_not(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"0 to 11.*{named}"):
        parse_layer_choice(text, 12)


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_taken_layers_compute_what_they_computed(layer_norm_first: bool) -> None:
    """Each taken layer, put behind the teacher's front, is the teacher's layer."""
    torch.manual_seed(0)
    layers = tuple(dataclasses.replace(layer, ffn_dim=8 + 4 * i) for i, layer in enumerate(config().layers))
    teacher = SpeechEncoder(config(layers=layers, layer_norm_first=layer_norm_first)).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shape, state = take_layers(teacher.config, teacher.state_dict(), (4, 1))
    assert [layer.ffn_dim for layer in shape.layers] == [24, 12]
    student = SpeechEncoder(shape).eval()
    student.load_encoder_state(state)
    source = torch.randn(2, 400)
    ours, its = student(source), teacher(source)
    torch.testing.assert_close(ours.hidden_states[0], its.hidden_states[0])
    x = its.hidden_states[0]
    for layer in (4, 1):
        x, _ = teacher.encoder.layers[layer](x)
    torch.testing.assert_close(ours.hidden_states[2], x)
    torch.testing.assert_close(ours.x, teacher.encoder.layer_norm(x) if layer_norm_first else x)


def test_layers_of_a_wavlm_take_the_position_bias_along() -> None:
    torch.manual_seed(0)
    biased = config(layers=uniform_layers(6, 2, 8, 24, True), position_buckets=8, position_heads=2)
    teacher = SpeechEncoder(biased)
    shape, state = take_layers(biased, teacher.state_dict(), (3,))
    student = SpeechEncoder(shape)
    student.load_encoder_state(state)
    bias = student.encoder.relative_attention_bias.weight
    assert torch.equal(bias, teacher.encoder.relative_attention_bias.weight)


def test_the_extractor_alone() -> None:
    torch.manual_seed(0)
    teacher = SpeechEncoder(config()).eval()
    rest = config(conv_layers=(ConvLayerConfig(4, 3, 2),), embed_dim=12, layers=uniform_layers(2, 3, 4, 6))
    shape, state = take_extractor(teacher.config, teacher.state_dict(), rest)
    assert shape.conv_layers == teacher.config.conv_layers and (shape.embed_dim, shape.num_layers) == (12, 2)
    assert set(state) == {n for n in teacher.state_dict() if n.startswith(("feature_extractor.", "layer_norm."))}
    student = SpeechEncoder(shape).eval()
    student.load_encoder_state({**student.state_dict(), **state})
    source = torch.randn(2, 400)
    torch.testing.assert_close(student(source).features, teacher(source).features)


def test_kept_heads_stay_with_their_last_layer() -> None:
    output = HeadsConfig(((6, 12),), 16, 16, 6, mode="predlayer")
    with pytest.raises(ValueError, match="keeps its prediction heads"):
        take_layers(config(output=output), {}, (0,))
    with pytest.raises(ValueError, match="`output` heads must read 6 layers of width 16"):
        config(output=dataclasses.replace(output, student_dim=8))
