"""Gates of a whole student: what is gated, the shared noise, evaluation gates, counts."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import UNITS, GateCounts, GateSet, GateValues, count_parameters, sparsity
from s3distill.gates.hard_concrete import STRETCH, TEMPERATURE

CONV = (ConvLayerConfig(6, 10, 5), ConvLayerConfig(8, 3, 2))
LAYERS = (
    LayerConfig(4, 4, 20),
    LayerConfig(3, 4, 12, ffn=False),
    LayerConfig(0, 4, 0),
    LayerConfig(2, 4, 8, attention=False),
)
CONFIG = EncoderConfig(CONV, 16, LAYERS, pos_conv_kernel=4, pos_conv_groups=2)


def spread(gates: GateSet, seed: int = 0, centre: float = -1.6) -> GateSet:
    """Scatters the locations, so that about half of the gates are open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(centre + 3 * torch.randn(gate.num_gates, generator=generator))
    return gates


def test_only_what_is_there_is_gated() -> None:
    gates = GateSet(CONFIG, UNITS)
    sizes = {(unit, layer): gate.num_gates for unit, layer, gate in gates.all_gates()}
    assert sizes == {
        ("conv", 0): 6,
        ("conv", 1): 8,
        ("head", 0): 4,
        ("head", 1): 3,
        ("ffn", 0): 20,
        ("ffn", 3): 8,
        ("attention_layer", 0): 1,
        ("attention_layer", 1): 1,
        ("attention_layer", 2): 1,  # no head is left, but its bias
        ("ffn_layer", 0): 1,
        ("ffn_layer", 2): 1,
        ("ffn_layer", 3): 1,
        **{("width", group): 8 for group in range(2)},
        **{("pos_conv", group): 8 for group in range(2)},
    }
    assert gates.num_gates == sum(sizes.values())
    assert set(gates.state_dict()) == {f"{unit}.{layer}.log_alpha" for unit, layer in sizes}


def test_units_are_gated_on_their_own() -> None:
    values = GateSet(CONFIG, ["ffn"]).sample(0)
    assert [None if v is None else tuple(v.shape) for v in values.ffn] == [(20,), None, None, (8,)]
    assert values.conv == GateValues.open(CONFIG).conv and values.heads == (None,) * 4
    assert values.attention_layers == (None,) * 4
    assert GateSet(CONFIG, ["ffn_layer"]).sample(0).ffn_layers[0].shape == ()  # type: ignore[union-attr]


def test_residual_stream_of_an_unprojected_encoder_is_not_gated() -> None:
    config = dataclasses.replace(CONFIG, embed_dim=8, project_features=False)
    gates = GateSet(config, ["conv"])
    assert list(gates.gates("conv")) == [0] and gates.sample(0).conv[1] is None
    assert gates.expected_counts().conv[1] == 8


def test_the_seed_alone_decides_the_noise() -> None:
    gates = GateSet(CONFIG, UNITS, init_drop=0.5)
    first = gates.sample(3)
    torch.manual_seed(99)
    random.seed(1)
    state = torch.get_rng_state()
    again, other = gates.sample(3), gates.sample(4)
    assert torch.equal(torch.get_rng_state(), state), "the run's own random state must not move"
    assert torch.equal(first.ffn[0], again.ffn[0]) and torch.equal(first.conv[1], again.conv[1])  # type: ignore[arg-type]
    assert not torch.equal(first.ffn[0], other.ffn[0])  # type: ignore[arg-type]
    assert not torch.equal(first.ffn[0][:8], first.ffn[3])  # type: ignore[index, arg-type]


def test_every_gate_receives_a_gradient() -> None:
    gates = spread(GateSet(CONFIG, UNITS))
    count_parameters(CONFIG, gates.expected_counts()).backward()  # type: ignore[union-attr]
    assert all(gate.log_alpha.grad.abs().min() > 0 for _, _, gate in gates.all_gates())  # type: ignore[union-attr]
    for gate in gates.parameters():
        gate.grad = None
    values = gates.sample(0)
    sum(v.sum() for v in (*values.conv, *values.heads, *values.ffn) if v is not None).backward()
    assert all(gate.log_alpha.grad is not None for gate in gates.gates("head").values())


def test_sampled_gates_change_the_encoder_and_open_ones_do_not() -> None:
    torch.manual_seed(0)
    encoder = SpeechEncoder(CONFIG).eval()
    audio = torch.randn(1, 400)
    gates = spread(GateSet(CONFIG, UNITS), seed=1)
    reference = encoder(audio).x
    assert torch.equal(encoder(audio, gates=GateValues.open(CONFIG)).x, reference)
    assert (encoder(audio, gates=gates.sample(0)).x - reference).abs().max() > 1e-3
    assert (encoder(audio, gates=gates.deterministic()).x - reference).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_kept_counts_are_those_of_the_deterministic_gates(seed: int) -> None:
    gates = spread(GateSet(CONFIG, UNITS), seed)
    assert gates.kept_counts() == GateCounts.from_values(CONFIG, gates.deterministic())
    kept = gates.kept_units()
    assert set(kept) == set(UNITS) and all(isinstance(n, int) for counts in kept.values() for n in counts)
    for i in range(4):  # what belongs to a closed sub-layer is gone
        assert kept["attention_layer"][i] or kept["head"][i] == 0
        assert kept["ffn_layer"][i] or kept["ffn"][i] == 0


@pytest.mark.parametrize("units", [("conv", "head", "ffn"), UNITS])
def test_deterministic_size_follows_the_expected_size(units: tuple[str, ...]) -> None:
    config = EncoderConfig((ConvLayerConfig(64, 10, 5),) * 2, 64, uniform_layers(4, 4, 16, 256), pos_conv_groups=4)
    gates = spread(GateSet(config, [u for u in units if not u.endswith("_layer")]))
    with torch.no_grad():
        expected = gates.expected_counts()
    kept = gates.kept_counts()
    for unit, layer, _ in gates.all_gates():
        if unit == "pos_conv":
            continue  # what is left of it depends on which channels of the stream close, not on their number alone
        assert abs(float(expected.as_dict()[unit][layer]) - float(kept.as_dict()[unit][layer])) <= 0.5 + 1e-6


def test_a_conv_layer_keeps_one_channel() -> None:
    gates = GateSet(CONFIG, UNITS)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.fill_(-50.0)
    assert gates.kept_units() == {
        "conv": (1, 1),
        "head": (0,) * 4,
        "ffn": (0,) * 4,
        "attention_layer": (0,) * 4,
        "ffn_layer": (0,) * 4,
        "width": (1, 1),
        "pos_conv": (1, 1),
    }
    assert [int((v > 0).sum()) for v in gates.deterministic().conv] == [1, 1]  # type: ignore[operator, union-attr]
    assert [int((v > 0).sum()) for v in gates.sample(0).conv] == [1, 1]  # type: ignore[operator, union-attr]
    with torch.no_grad():
        assert [float(c) for c in gates.expected_counts().conv] == [1.0, 1.0]
    audio = torch.randn(1, 400)
    assert SpeechEncoder(CONFIG).eval()(audio, gates=gates.deterministic()).x.isfinite().all()


def test_evaluation_gates_follow_loaded_values() -> None:
    one, other = spread(GateSet(CONFIG, UNITS), 1), spread(GateSet(CONFIG, UNITS), 2)
    stale = other.deterministic().ffn[0]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.deterministic().ffn[0], one.deterministic().ffn[0])  # type: ignore[arg-type]
    assert not torch.equal(other.deterministic().ffn[0], stale)  # type: ignore[arg-type]


def test_open_gates_count_the_whole_encoder() -> None:
    gates = GateSet(CONFIG, UNITS)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.fill_(60.0)
    with torch.no_grad():
        expected = count_parameters(CONFIG, gates.expected_counts())
    assert float(expected) == count_parameters(CONFIG, GateCounts.full(CONFIG))


def test_initial_sparsity_of_hubert_base_is_near_zero() -> None:
    torch.manual_seed(0)
    conv = parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
    config = EncoderConfig(conv, 768, uniform_layers(12, 12, 64, 3072))
    with torch.no_grad():
        recipe = GateSet(config, ("conv", "head", "ffn")).expected_counts()
        everything = GateSet(config, UNITS).expected_counts()
        published = GateSet(config, ("conv", "head", "ffn"), init_drop={"ffn": 0.5}).expected_counts()
    for measure in ("params", "macs"):
        assert 0.001 < float(sparsity(config, recipe, measure)) < 0.003
        assert 0.005 < float(sparsity(config, everything, measure)) < 0.007
    assert float(sparsity(config, published)) == pytest.approx(0.10, abs=0.005)  # what DPHuBERT starts with


def test_gates_stay_float32_inside_a_cast_model() -> None:
    gates = torch.nn.ModuleDict({"gates": GateSet(CONFIG, UNITS)}).half()["gates"]
    assert all(p.dtype == torch.float32 for p in gates.parameters())
    assert gates.sample(0).ffn[0].dtype == torch.float32 and gates.deterministic().conv[0].dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"one or more different ones of conv, head, ffn, attention_layer, ffn_layer.*'interm'"
    ):
        GateSet(CONFIG, ["conv", "interm"])
    with pytest.raises(ValueError, match="different ones"):
        GateSet(CONFIG, ["conv", "conv"])
    with pytest.raises(ValueError, match="one or more"):
        GateSet(CONFIG, [])
    with pytest.raises(ValueError, match="'heads'"):
        GateSet(CONFIG, ["head"], init_drop={"heads": 0.1})
    with pytest.raises(ValueError, match="`init_drop` must be in"):
        GateSet(CONFIG, ["head"], init_drop=0.0)
    bare = dataclasses.replace(CONFIG, layers=(LayerConfig(0, 4, 0),))
    with pytest.raises(ValueError, match="none of head, ffn left to prune"):
        GateSet(bare, ["ffn", "head"])


def test_diverged_gates_are_named() -> None:
    gates = GateSet(CONFIG, ["head"])
    with torch.no_grad():
        gates.gates("head")[1].log_alpha[0] = float("nan")
    for call in (gates.deterministic, gates.kept_units):
        with pytest.raises(RuntimeError, match=r"the gates head.1 hold NaN"):
            call()


def test_whole_layers_close_as_many_as_are_expected_to() -> None:
    """Four layers with P(open) = 0.6 each: rounded one by one all would stay, together two of them go (4 - 2.4 = 1.6)."""
    config = EncoderConfig(
        conv_layers=parse_conv_layers("[(8, 10, 5)]"),
        embed_dim=16,
        layers=uniform_layers(4, 2, 8, 16),
        pos_conv_groups=4,
    )
    gates = GateSet(config, ["ffn_layer"])
    location = math.log(0.6 / 0.4) + TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])
    with torch.no_grad():
        for layer, gate in gates.gates("ffn_layer").items():
            gate.log_alpha.fill_(location + 1e-3 * layer)
    values = gates.deterministic().ffn_layers
    assert [float(value) > 0 for value in values if value is not None] == [False, False, True, True]
    assert gates.kept_counts().ffn_layers == (0, 0, 1, 1)


def test_stream_and_positional_convolution_are_counted_together() -> None:
    """Of the last positional convolution's outputs those count whose channel of the stream is open too."""
    gates = GateSet(CONFIG, ["width", "pos_conv"])
    with torch.no_grad():
        gates.gates("width")[0].log_alpha.copy_(torch.tensor([60.0] * 3 + [-60.0] * 5))
        gates.gates("width")[1].log_alpha.fill_(60.0)
        gates.gates("pos_conv")[0].log_alpha.copy_(torch.tensor([60.0, -60.0] * 4))
        gates.gates("pos_conv")[1].log_alpha.copy_(torch.tensor([60.0, -60.0] * 4))
        expected = gates.expected_counts()
    assert gates.kept_counts().width == tuple(map(float, expected.width)) == (3, 8)
    assert gates.kept_counts().pos_conv == tuple(map(float, expected.pos_conv)) == (2, 4)
    values = gates.deterministic()
    assert GateCounts.from_values(CONFIG, values) == gates.kept_counts()
    assert float(count_parameters(CONFIG, expected)) == count_parameters(CONFIG, gates.kept_counts())


def test_an_unprojected_encoder_has_the_stream_of_its_last_conv_layer() -> None:
    config = dataclasses.replace(CONFIG, embed_dim=8, project_features=False)
    gates = spread(GateSet(config, ["conv", "width"]))
    kept = gates.kept_counts()
    assert kept.conv[1] == sum(kept.width) < 8 and kept == GateCounts.from_values(config, gates.deterministic())
    with torch.no_grad():
        expected = gates.expected_counts()
        assert float(expected.conv[1]) == float(sum(expected.width))
