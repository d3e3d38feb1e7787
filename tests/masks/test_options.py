"""The options of S3-Router: which modules they mask with which density, what they refuse, and in which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.encoder.config import EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.pos_shape import PosConvShape
from s3distill.masks.options import MaskOptions, layer_of
from s3distill.masks.scores import INITS
from s3distill.masks.selection import PATTERNS

CONV = parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2")


def config(num_layers: int = 3, **options: Any) -> EncoderConfig:
    values = {"layers": uniform_layers(num_layers, 4, 8, 48), "pos_conv_kernel": 16, "pos_conv_groups": 4, **options}
    return EncoderConfig(conv_layers=CONV, embed_dim=32, **values)


def names(layers: range, what: tuple[str, ...]) -> list[str]:
    return [f"w2v_model.encoder.layers.{i}.{name}" for i in layers for name in what]


ATTENTION = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
FFN = ("fc1", "fc2")
POST, HEAD, POS = "w2v_model.post_extract_proj", "proj", "w2v_model.encoder.pos_conv.0"
EXTRACTOR = [f"w2v_model.feature_extractor.conv_layers.{i}.0" for i in range(7)]


def masked(options: MaskOptions, shape: EncoderConfig | None = None) -> dict[str, float]:
    """Module -> density."""
    return {name: rule.density for name, rule in options.rules(shape or config()).items()}


def outside(**unmasked: bool) -> dict[str, Any]:
    """Nothing but the layers is masked, unless said otherwise."""
    return {"no_prune_post_extract_proj": True, **unmasked}


# ---------------------------------------------------------------- what is masked


def test_the_defaults_are_the_originals() -> None:
    assert (
        dataclasses.asdict(MaskOptions()).items()
        >= {
            "prune_rate": 0.5,
            **{"no_prune_proj": True, "no_prune_extractor": True, "no_prune_pos": True},
            "no_prune_post_extract_proj": False,
            **dict.fromkeys(
                [f"trainable_{n}" for n in ("bias", "layer_norm", "pos", "proj", "post_extract_proj")], False
            ),
            **{"trainable_if_unpruned": False, "co_train": False},
            **{"init_score": "kaiming_uniform", "init_score_scale": 1.0},
            **{"fix_attn": False, "fix_fc": False, "layerwise_prune_rate": (), "fc_attn_prune_rate": ()},
            **{"ste_sigmoid": False, "linear_st_op": "linear_st", "mask_pattern": "unstructured"},
            **{"fix_mask": False, "fix_mask_before": 0, "load_mask_only": False, "load_mask_before": 0},
        }.items()
    )


LAYERS = names(range(3), (*ATTENTION, *FFN))
WHAT_IS_MASKED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, [POST, *LAYERS]),
    ({"no_prune_post_extract_proj": True}, LAYERS),
    (outside(no_prune_proj=False), [*LAYERS, HEAD]),
    (outside(no_prune_pos=False), [POS, *LAYERS]),
    (outside(no_prune_extractor=False), [*EXTRACTOR, *LAYERS]),
    (outside(fix_attn=True), names(range(3), FFN)),
    (outside(fix_fc=True), names(range(3), ATTENTION)),
    (outside(fix_attn=True, fix_fc=True), []),
    ({"fix_attn": True, "fix_fc": True}, [POST]),
    (
        {"no_prune_proj": False, "no_prune_pos": False, "no_prune_extractor": False},
        [*EXTRACTOR, POST, POS, *LAYERS, HEAD],
    ),
    # these say what learns, not what is masked
    *(
        (outside(**{name: True}), LAYERS)
        for name in ("trainable_bias", "trainable_layer_norm", "trainable_pos", "trainable_proj", "co_train")
    ),
    (outside(trainable_if_unpruned=True, trainable_post_extract_proj=True), LAYERS),
    (outside(fix_mask=True), LAYERS),
    (outside(fix_mask_before=2, load_mask_before=1), LAYERS),
]


@pytest.mark.parametrize(
    ("options", "expected"), WHAT_IS_MASKED, ids=lambda v: ",".join(v) if isinstance(v, dict) else ""
)
def test_which_modules_are_masked(options: dict[str, Any], expected: list[str]) -> None:
    assert masked(MaskOptions(prune_rate=0.9, **options)) == dict.fromkeys(expected, 0.9)


def test_encoder_first_and_head_last() -> None:
    everything = MaskOptions(no_prune_proj=False, no_prune_pos=False, no_prune_extractor=False)
    assert sorted(masked(everything)) == sorted([*EXTRACTOR, POST, POS, *LAYERS, HEAD])
    first, *_, last = masked(everything)
    assert (first, last) == (EXTRACTOR[0], HEAD)


def test_density_one_is_no_mask() -> None:
    assert masked(MaskOptions(prune_rate=1.0, no_prune_proj=False)) == {}


@pytest.mark.parametrize("num_layers", [2, 12, 24])
def test_any_number_of_layers(num_layers: int) -> None:
    shape = config(num_layers)
    rates = [round(0.3 + 0.7 * i / num_layers, 3) for i in range(num_layers)]
    expected = {name: rates[i] for i in range(num_layers) for name in names(range(i, i + 1), (*ATTENTION, *FFN))}
    assert masked(MaskOptions(layerwise_prune_rate=rates), shape) == expected
    assert len(masked(MaskOptions(), shape)) == 6 * num_layers + 1


def test_a_density_per_layer() -> None:
    """Modules outside of the layers stay whole, as in S3-Router; a layer with 1 is not masked."""
    found = masked(MaskOptions(layerwise_prune_rate=[0.9, 1.0, 0.3], no_prune_proj=False, no_prune_pos=False))
    assert found == dict.fromkeys(names(range(1), (*ATTENTION, *FFN)), 0.9) | dict.fromkeys(
        names(range(2, 3), (*ATTENTION, *FFN)), 0.3
    )
    only_ffn = masked(MaskOptions(layerwise_prune_rate=[0.9, 0.8, 0.3], fix_attn=True))
    assert only_ffn == {n: r for i, r in enumerate((0.9, 0.8, 0.3)) for n in names(range(i, i + 1), FFN)}


def test_a_density_for_ffn_and_attention() -> None:
    found = masked(MaskOptions(**outside(fc_attn_prune_rate=[0.9, 0.8])))
    assert found == dict.fromkeys(names(range(3), FFN), 0.9) | dict.fromkeys(names(range(3), ATTENTION), 0.8)
    assert masked(MaskOptions(**outside(fc_attn_prune_rate=[0.9, 1.0]))) == dict.fromkeys(names(range(3), FFN), 0.9)


@pytest.mark.parametrize("empty", [None, [], ()])
def test_empty_lists_mean_one_density_everywhere(empty: Any) -> None:
    """None crashes in the original."""
    values = {"prune_rate": 0.7, "layerwise_prune_rate": empty, "fc_attn_prune_rate": empty}
    options = MaskOptions.from_mapping(values)
    assert masked(options) == dict.fromkeys([POST, *LAYERS], 0.7)


def test_words_are_no_truth_values() -> None:
    """`bool("false")` is true."""
    with pytest.raises(ValueError, match=r"`co_train` must be true or false, but is 'false'"):
        MaskOptions.from_mapping({"co_train": "false"})


@pytest.mark.parametrize(
    ("op", "pattern", "expected"),
    [
        ("linear_st", "unstructured", "unstructured"),
        ("linear_st", "rows", "rows"),
        ("linear_st", "2:4", "2:4"),
        ("linear_st_outstr", "unstructured", "rows"),
        ("linear_st_outstr", "rows", "rows"),
        ("linear_st_instr", "unstructured", "columns"),
        ("linear_st_instr", "columns", "columns"),
    ],
)
def test_patterns(op: str, pattern: str, expected: str) -> None:
    options = MaskOptions(linear_st_op=op, mask_pattern=pattern, ste_sigmoid=True)
    assert {(r.pattern, r.ste_sigmoid) for r in options.rules(config()).values()} == {(expected, True)}


# ---------------------------------------------------------------- shapes


def test_what_pruning_took_away_is_not_masked() -> None:
    layers = (
        LayerConfig(4, 8, 48),
        LayerConfig(4, 8, 48, attention=False),
        LayerConfig(0, 8, 48),
        LayerConfig(4, 8, 48, ffn=False),
        LayerConfig(4, 8, 0),
        LayerConfig(0, 8, 0, attention=False, ffn=False),
    )
    expected = [
        *names(range(1), (*ATTENTION, *FFN)),
        *(n for i in (1, 2) for n in names(range(i, i + 1), FFN)),
        *(n for i in (3, 4) for n in names(range(i, i + 1), ATTENTION)),
    ]
    shape = config(layers=layers)
    assert list(masked(MaskOptions(**outside()), shape)) == expected
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # still one for each, also for layers that are gone
    found = masked(MaskOptions(layerwise_prune_rate=rates), shape)
    assert found == {name: rates[layer_of(name)] for name in expected}


def test_without_a_projection_of_features_there_is_nothing_to_mask() -> None:
    shape = dataclasses.replace(config(), embed_dim=16, project_features=False)
    assert POST not in masked(MaskOptions(), shape)


def test_data2vecs_stack_of_positional_convolutions() -> None:
    shape = config(pos_conv_depth=5, pos_conv_kernel=95)
    found = masked(MaskOptions(**outside(no_prune_pos=False, fix_attn=True, fix_fc=True)), shape)
    assert list(found) == [f"w2v_model.encoder.pos_conv.{i}.0" for i in range(5)]


# ---------------------------------------------------------------- what learns and what is taken over


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, []),
        ({"fix_mask": True}, [POST, *LAYERS, HEAD]),
        ({"fix_mask_before": 1}, [POST, *names(range(1), (*ATTENTION, *FFN))]),
        ({"fix_mask_before": 3}, [POST, *LAYERS]),
        ({"fix_mask": True, "fix_mask_before": 1}, [POST, *LAYERS, HEAD]),
    ],
)
def test_scores_that_are_fixed(options: dict[str, Any], frozen: list[str]) -> None:
    """``fix_mask_before`` includes what is in front of the layers; the head is behind them."""
    chosen = MaskOptions(no_prune_proj=False, **options)
    assert [name for name in masked(chosen) if not chosen.scores_learn(name)] == frozen


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"load_mask_only": True}, [POST, *LAYERS, HEAD]),
        ({"load_mask_before": 1}, [POST, *names(range(1), (*ATTENTION, *FFN))]),
        ({"load_mask_before": 3}, [POST, *LAYERS]),
        ({"load_mask_only": True, "load_mask_before": 1}, [POST, *names(range(1), (*ATTENTION, *FFN))]),
    ],
)
def test_scores_that_are_taken_over(options: dict[str, Any], taken: list[str]) -> None:
    """Layers below N: the original's <= N takes one more."""
    chosen = MaskOptions(no_prune_proj=False, **options)
    assert [name for name in masked(chosen) if chosen.takes_scores(name)] == taken


def test_layers_are_found_by_their_place() -> None:
    assert layer_of("w2v_model.encoder.layers.11.fc1") == 11
    assert {layer_of(n) for n in (POST, POS, HEAD, EXTRACTOR[3])} == {-1}


# ---------------------------------------------------------------- errors

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    *(
        ({"prune_rate": value}, ["`prune_rate`", "kept fraction", "(0, 1]", f"is {value}", "0.9 removes 10%"])
        for value in (0.0, -0.1, 1.1, 90.0, float("nan"), float("inf"))
    ),
    ({"layerwise_prune_rate": [0.9, 1.2, 0.9]}, ["`layerwise_prune_rate[1]`", "(0, 1]", "1.2", "0.9 removes 10%"]),
    ({"layerwise_prune_rate": [0.0]}, ["`layerwise_prune_rate[0]`", "0.0"]),
    (outside(fc_attn_prune_rate=[0.9, -1.0]), ["`fc_attn_prune_rate[1]`", "(0, 1]", "-1.0"]),
    (outside(fc_attn_prune_rate=[0.9]), ["`fc_attn_prune_rate`", "[fc, attention]", "has 1", "[0.9,0.95]", "[]"]),
    (outside(fc_attn_prune_rate=[0.9] * 3), ["`fc_attn_prune_rate`", "has 3"]),
    (
        outside(fc_attn_prune_rate=[0.9, 0.9], layerwise_prune_rate=[0.9] * 3),
        ["`layerwise_prune_rate`", "`fc_attn_prune_rate`", "leave one of them empty ([])"],
    ),
    (
        {"fc_attn_prune_rate": [0.9, 0.9]},
        ["`fc_attn_prune_rate`", "post_extract_proj would be masked", "set no_prune_post_extract_proj=true"],
    ),
    (
        outside(fc_attn_prune_rate=[0.9, 0.9], no_prune_proj=False, no_prune_pos=False, no_prune_extractor=False),
        ["proj, extractor, pos", "no_prune_proj=true, no_prune_extractor=true, no_prune_pos=true"],
    ),
    ({"init_score": "best"}, ["`init_score`", *INITS, "'best'"]),
    ({"linear_st_op": "linear"}, ["`linear_st_op`", "linear_st, linear_st_outstr, linear_st_instr", "'linear'"]),
    ({"mask_pattern": "1:2"}, ["`mask_pattern`", *PATTERNS, "'1:2'"]),
    ({"init_score_scale": 0.0}, ["`init_score_scale`", "divides the weights", "finite and not 0", "pass 1"]),
    (
        {"linear_st_op": "linear_st_outstr", "mask_pattern": "columns"},
        ["`linear_st_op` linear_st_outstr", "rows", "`mask_pattern` is columns", "set only one"],
    ),
    ({"linear_st_op": "linear_st_instr", "mask_pattern": "2:4"}, ["columns", "`mask_pattern` is 2:4"]),
    ({"mask_pattern": "2:4", "prune_rate": 0.9}, ["2:4", "exactly half", "`prune_rate` is 0.9", "0.5"]),
    ({"mask_pattern": "2:4", "layerwise_prune_rate": [0.5, 0.6]}, ["2:4", "`layerwise_prune_rate[1]` is 0.6"]),
    (outside(mask_pattern="2:4", fc_attn_prune_rate=[0.5, 0.6]), ["2:4", "`fc_attn_prune_rate[1]` is 0.6"]),
    ({"init_score_scale": float("inf")}, ["`init_score_scale`", "finite and not 0", "inf", "pass 1"]),
    ({"init_score_scale": float("nan")}, ["`init_score_scale`", "nan"]),
    ({"fix_mask_before": -1}, ["`fix_mask_before`", "counts layers", "at least 0", "-1"]),
    ({"load_mask_before": -2}, ["`load_mask_before`", "counts layers", "at least 0", "-2"]),
]


@pytest.mark.parametrize(("options", "parts"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_is_refused_and_how(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MaskOptions(**options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("length", [1, 2, 4, 12])
def test_a_list_of_the_wrong_length(length: int) -> None:
    with pytest.raises(ValueError) as caught:
        MaskOptions(layerwise_prune_rate=[0.9] * length).rules(config(3))
    parts = ("`layerwise_prune_rate`", f"each of the 3 encoder layers, but has {length}", "[] means prune_rate")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("name", ["fix_mask_before", "load_mask_before"])
def test_a_layer_that_is_not_there(name: str) -> None:
    MaskOptions(**{name: 3}).check_start(3)
    too_deep = MaskOptions(**{name: 4})
    with pytest.raises(
        ValueError, match=f"`{name}` names a layer and must be at most 3, the encoder's layers, but is 4"
    ):
        too_deep.check_start(3)
    assert len(too_deep.rules(config(3))) == 19, "a checkpoint that was trained so still loads"


def test_densities_per_layer_refuse_masks_outside_of_the_layers() -> None:
    options = MaskOptions(layerwise_prune_rate=[0.9] * 3, no_prune_proj=False, no_prune_pos=False)
    with pytest.raises(ValueError) as caught:
        options.check_start(3)
    parts = [
        "`layerwise_prune_rate`",
        "no_prune_proj=false, no_prune_pos=false would mask",
        "set no_prune_proj=true, no_prune_pos",
    ]
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    MaskOptions(layerwise_prune_rate=[0.9] * 3).check_start(3)
    assert len(options.rules(config(3))) == 18, "they stay whole, as in S3-Router, whose checkpoints load"


@pytest.mark.parametrize(
    "options",
    [
        {"prune_rate": 1.0},
        {"prune_rate": 1e-9},
        {"mask_pattern": "2:4", "prune_rate": 1.0},
        {"mask_pattern": "2:4", "layerwise_prune_rate": [0.5, 1.0]},
        {"init_score_scale": -2.0},
        {"layerwise_prune_rate": [1.0] * 3},
    ],
)
def test_what_is_in_range_is_accepted(options: dict[str, Any]) -> None:
    made = MaskOptions(**options)
    assert {name: getattr(made, name) for name in options} == options


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_density_is_within_zero_and_one(value: float) -> None:
    if 0 < value <= 1:
        assert MaskOptions(prune_rate=value).prune_rate == value
    else:
        with pytest.raises(ValueError, match="`prune_rate`"):
            MaskOptions(prune_rate=value)


# ---------------------------------------------------------------- from a model's options


def test_from_a_models_options() -> None:
    """Those of other classes are left alone, enums become their values, lists tuples of numbers."""
    pytest.importorskip("fairseq")
    from fairseq.dataclass import ChoiceEnum
    from omegaconf import OmegaConf

    init = ChoiceEnum(list(INITS))
    values = OmegaConf.create(
        {"dropout": 0.1, "prune_rate": 0.9, "layerwise_prune_rate": [1, 0.5], "fc_attn_prune_rate": None},
        flags={"allow_objects": True},
    )
    options = MaskOptions.from_mapping({**values, "init_score": init.weight_rank, "w2v_path": "base.pt"})
    assert options == MaskOptions(prune_rate=0.9, layerwise_prune_rate=(1.0, 0.5), init_score="weight_rank")
    assert MaskOptions.from_mapping({}) == MaskOptions()


def test_the_models_options_are_these() -> None:
    """Every option is one of `wav2vec_ctc_st`, with the same default."""
    pytest.importorskip("fairseq")
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    import s3distill  # noqa: F401  registers it

    fields = {f.name: f.default for f in dataclasses.fields(MODEL_DATACLASS_REGISTRY["wav2vec_ctc_st"])}
    for field in dataclasses.fields(MaskOptions):
        default = getattr(fields[field.name], "value", fields[field.name])
        assert (() if field.name.endswith("prune_rate") and default is None else default) == field.default, field.name
    help_of = MODEL_DATACLASS_REGISTRY["wav2vec_ctc_st"].__dataclass_fields__
    assert all(help_of[f.name].metadata.get("help") for f in dataclasses.fields(MaskOptions))


def test_a_pruned_positional_convolution_has_no_masked_form() -> None:
    cut = config(pos_conv_shape=PosConvShape((9, 8, 8, 7), (), tuple(range(32))))
    assert POS not in masked(MaskOptions(), cut)
    with pytest.raises(ValueError, match="`no_prune_pos` must be true where pruning left groups of different sizes"):
        MaskOptions(no_prune_pos=False).rules(cut)
