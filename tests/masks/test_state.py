"""What is taken from a checkpoint: scores that start from loaded weights, scores in the file, scores alone, S3-Router's own files."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq")

from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import ATTENTION_LINEARS, FFN_LINEARS, MaskOptions
from s3distill.masks.state import SCORES, adopt_state, baked, network_of, read_masks
from tests.encoder import checkpoints

CONFIG = EncoderConfig(
    conv_layers=parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"),
    embed_dim=32,
    layers=uniform_layers(3, 4, 8, 48),
    pos_conv_kernel=16,
    pos_conv_groups=4,
)
WAVEFORM = torch.randn(2, 6000, generator=torch.Generator().manual_seed(1))
State = dict[str, Tensor]


def network(config: EncoderConfig = CONFIG, num_outputs: int = 7, seed: int = 0, **options: Any) -> MaskedNetwork:
    torch.manual_seed(seed)
    made = MaskedNetwork(config, num_outputs)
    made.add_masks(MaskOptions(**{"prune_rate": 0.5, **options}))
    return made


def filled(made: nn.Module, seed: int) -> State:
    """A state of its shape with other values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in made.state_dict().items()}


def without_scores(state: State) -> State:
    return {name: value for name, value in state.items() if not name.endswith(SCORES)}


def snapshot(made: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in made.named_parameters()}


def changed(made: nn.Module, before: State) -> set[str]:
    return {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}


# ---------------------------------------------------------------- a state without scores


@pytest.mark.parametrize("init", ["weight_rank", "weight_magnitude", "negative_weight_magnitude"])
def test_scores_start_from_the_loaded_weights(init: str) -> None:
    """The pruning recipe: not from those that the network was built with."""
    made = network(init_score=init, no_prune_proj=False, no_prune_pos=False, no_prune_extractor=False)
    state = without_scores(filled(made, 3))
    before = {name: module.mask() for name, module in made.masked_modules().items()}
    adopt_state(made, state)
    for name, module in made.masked_modules().items():
        assert not torch.equal(module.mask(), before[name])
        weight, mask = module.dense_weight().detach().abs(), module.mask()
        if init.startswith("negative"):
            mask = ~mask
        assert weight[mask].min() >= weight[~mask].max(), name
    for name, value in state.items():
        assert torch.equal(made.state_dict()[name], value), name


def test_weight_magnitude_with_scale_is_the_loaded_weight() -> None:
    made = network(init_score="weight_magnitude_with_scale", init_score_scale=0.5, no_prune_pos=False)
    state = without_scores(filled(made, 3))
    adopt_state(made, state)
    for name, module in made.masked_modules().items():
        torch.testing.assert_close(module.scores, module.dense_weight() / 0.5)
        if f"{name}.weight" in state:
            assert torch.equal(module.scores, state[f"{name}.weight"] / 0.5)


def test_noise_starts_as_it_did() -> None:
    made = network(init_score="kaiming_uniform")
    before = {name: module.scores.detach().clone() for name, module in made.masked_modules().items()}
    adopt_state(made, without_scores(filled(made, 3)))
    for name, module in made.masked_modules().items():
        assert torch.equal(module.scores, before[name]), name


def test_half_precision_weights_are_taken() -> None:
    made = network(init_score="weight_magnitude_with_scale")
    state = {name: value.half() for name, value in without_scores(filled(made, 3)).items()}
    adopt_state(made, state)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert torch.equal(made.state_dict()["proj.weight"], state["proj.weight"].float())


# ---------------------------------------------------------------- a state with scores


def test_weights_and_scores_are_taken_as_they_are() -> None:
    made = network(init_score="weight_rank")
    state = filled(made, 3)
    adopt_state(made, state)
    for name, value in state.items():
        assert torch.equal(made.state_dict()[name], value), name


def test_the_masks_are_seen_at_once() -> None:
    made = network().eval()
    first = made(WAVEFORM)[0]
    twin = network(seed=1).eval()
    assert not torch.allclose(twin(WAVEFORM)[0], first)
    adopt_state(twin, made.state_dict())
    assert torch.equal(twin(WAVEFORM)[0], first)


def test_scores_of_modules_that_are_not_masked_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """S3-Router saves the attention's scores under fix_attn."""
    state = filled(network(), 3)
    made = network(fix_attn=True)
    with caplog.at_level(logging.INFO):
        adopt_state(made, state)
    assert "scores of 12 modules that are not masked here are left out" in caplog.text
    assert torch.equal(
        made.state_dict()["w2v_model.encoder.layers.0.fc1.scores"], state["w2v_model.encoder.layers.0.fc1.scores"]
    )
    assert not any("self_attn" in name and name.endswith(SCORES) for name in made.state_dict())


def test_leftovers_of_pre_training_are_left_out_but_not_of_the_head() -> None:
    made = network()
    state = filled(made, 3)
    adopt_state(
        made, state | {"w2v_model.label_embs_concat": torch.ones(3), "w2v_model.final_proj.weight": torch.ones(2)}
    )
    with pytest.raises(ValueError, match=r"unexpected: \['proj.extra'\]"):
        adopt_state(made, state | {"proj.extra": torch.ones(3)})


# ---------------------------------------------------------------- scores alone


def test_load_mask_only_takes_the_scores_and_nothing_else() -> None:
    made = network(load_mask_only=True, no_prune_proj=False)
    before, state = snapshot(made), filled(made, 3)
    adopt_state(made, state, masks_only=True)
    taken = {name for name in state if name.endswith(SCORES)}
    assert changed(made, before) == taken and len(taken) == 20
    assert all(torch.equal(made.state_dict()[name], state[name]) for name in taken)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_load_mask_before_takes_the_layers_below(number: int) -> None:
    """And what is in front of the layers, but not the head; the original took layer N too."""
    made = network(load_mask_before=number, no_prune_proj=False)
    before, state = snapshot(made), filled(made, 3)
    adopt_state(made, state, masks_only=True)
    expected = {
        f"w2v_model.encoder.layers.{i}.{n}.scores" for i in range(number) for n in (*ATTENTION_LINEARS, *FFN_LINEARS)
    }
    assert changed(made, before) == expected | {"w2v_model.post_extract_proj.scores"}


def test_scores_alone_need_no_weights_of_the_same_head() -> None:
    """Another language's file: another dictionary."""
    made = network(num_outputs=7, load_mask_only=True)
    state = filled(network(num_outputs=11), 3)
    adopt_state(made, state, masks_only=True)
    assert torch.equal(
        made.state_dict()["w2v_model.encoder.layers.2.fc2.scores"], state["w2v_model.encoder.layers.2.fc2.scores"]
    )
    masks = {name: value for name, value in state.items() if name.endswith(SCORES)}
    adopt_state(made, masks, masks_only=True)


def test_scores_alone_where_the_file_has_none() -> None:
    made = network(load_mask_only=True)
    with pytest.raises(ValueError, match=r"has none for .*start from a checkpoint with masks"):
        adopt_state(made, without_scores(filled(made, 3)), masks_only=True)


def test_scores_alone_of_modules_that_are_not_masked() -> None:
    made = network(load_mask_before=2, fix_attn=True, fix_fc=True, no_prune_post_extract_proj=True, no_prune_proj=False)
    with pytest.raises(
        ValueError, match="`load_mask_before`=2 names no module that is masked; raise it, or set load_mask_only"
    ):
        adopt_state(made, filled(network(), 3), masks_only=True)


# ---------------------------------------------------------------- errors


def remove(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


FC1 = "w2v_model.encoder.layers.1.fc1"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (
            lambda s: remove(s, f"{FC1}.scores"),
            ["scores for every masked module", FC1, "(1 of 19)", "mask the modules that it masks"],
        ),
        (
            lambda s: s | {f"{FC1}.scores": torch.ones(48, 1)},
            [f"the scores of {FC1}", "(48, 32)", "(48, 1)", "mask_pattern or linear_st_op", "another backbone"],
        ),
        (lambda s: remove(s, f"{FC1}.weight"), ["not of this backbone", f"missing: ['{FC1}.weight']"]),
        (
            lambda s: s | {f"{FC1}.weight": torch.ones(40, 32)},
            [f"of another shape: ['{FC1}.weight: (40, 32) instead of (48, 32)']", "same model.w2v_path and dictionary"],
        ),
        (
            lambda s: s | {"proj.weight": torch.ones(9, 32), "proj.bias": torch.ones(9)},
            ["of another shape", "proj.weight: (9, 32) instead of (7, 32)", "dictionary"],
        ),
        (
            lambda s: s | {"w2v_model.encoder.layers.3.fc1.weight": torch.ones(48, 32)},
            ["unexpected: ['w2v_model.encoder.layers.3.fc1.weight']"],
        ),
        (lambda s: {}, ["missing", "proj.bias"]),
        (
            lambda s: s | {f"{FC1}.weight": torch.full((48, 32), torch.nan)},
            [f"must be finite, but {FC1}.weight (1 in all)", "diverged; take an earlier checkpoint"],
        ),
    ],
)
def test_states_that_do_not_fit(spoil: Any, parts: list[str]) -> None:
    made = network()
    state, before = spoil(filled(made, 3)), snapshot(made)
    with pytest.raises(ValueError) as caught:
        adopt_state(made, state)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not changed(made, before), "a state that is refused must leave everything as it was"


def test_another_backbone_is_refused() -> None:
    larger = dataclasses.replace(CONFIG, layers=uniform_layers(4, 4, 8, 48))
    with pytest.raises(ValueError, match=r"another|unexpected"):
        adopt_state(network(), filled(network(larger), 3))
    with pytest.raises(ValueError, match=r"has none for w2v_model\.encoder\.layers\.3"):
        adopt_state(network(larger), filled(network(), 3))


def test_masks_come_first() -> None:
    with pytest.raises(AssertionError, match="add_masks comes first"):
        adopt_state(MaskedNetwork(CONFIG, 7), {})


# ---------------------------------------------------------------- S3-Router's own files

RATE = 0.7
# families, and what the original masks beside the layers; `fix_attn` leaves scores on attention that mean nothing
CASES = [
    ("wav2vec2", {"fix_attn": True, "no_prune_post_extract_proj": True}),
    ("wav2vec2", {"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False}),
    ("hubert", {"fix_attn": True, "no_prune_post_extract_proj": True}),
    ("hubert", {"fix_fc": True}),
    ("data2vec_audio", {"fix_attn": True, "no_prune_post_extract_proj": True}),
    ("data2vec_audio", {"no_prune_proj": False, "no_prune_extractor": False}),
]
SHAPES = {"base": checkpoints.SMALL, "large": checkpoints.LARGE | checkpoints.SMALL}


def removed_by_sorting(scores: Tensor, rate: float) -> Tensor:
    """The original's rule, with a stable sort."""
    mask = torch.ones(scores.numel())
    mask[scores.abs().flatten().argsort(stable=True)[: int((1 - rate) * scores.numel())]] = 0
    return mask.view(scores.shape)


@torch.no_grad()
def originals_file(family: str, options: dict[str, Any], shape: str) -> tuple[dict[str, Any], nn.Module]:
    """A checkpoint in S3-Router's layout, and fairseq's own model with W * mask written into its weights."""
    state, model = checkpoints.fine_tuned(family, SHAPES[shape], seed=1)
    state["model"] = {name: value.clone() for name, value in state["model"].items()}
    state["cfg"]["model"] |= {"_name": "wav2vec_ctc_st", "prune_rate": RATE, "init_score": "weight_rank", **options}
    generator = torch.Generator().manual_seed(2)
    chosen = MaskOptions.from_mapping(state["cfg"]["model"])
    config = parse_checkpoint(state).config
    always = [f"w2v_model.encoder.layers.{i}.{n}" for i in range(3) for n in (*ATTENTION_LINEARS, *FFN_LINEARS)]
    for name in dict.fromkeys([*always, *chosen.rules(config)]):
        module = model.w2v_encoder.get_submodule(name)
        weight = module.weight
        if hasattr(module, "weight_g"):
            weight = torch._weight_norm(module.weight_v, module.weight_g, 2)
        scores = torch.randn(weight.shape, generator=generator)
        state["model"][f"w2v_encoder.{name}.scores"] = scores
        if name not in chosen.rules(config):
            continue
        written = weight * removed_by_sorting(scores, RATE)
        if hasattr(module, "weight_g"):
            module.weight_v.copy_(written)
            module.weight_g.copy_(written.norm(dim=(0, 1), keepdim=True))
        else:
            module.weight.copy_(written)
    return state, model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, source: Tensor) -> Tensor:
    """[B, T, V] of fairseq's model."""
    padding = torch.zeros(source.shape, dtype=torch.bool)
    return model(source=source, padding_mask=padding)["encoder_out"].transpose(0, 1)


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_originals_files_give_the_originals_logits(family: str, options: dict[str, Any], shape: str) -> None:
    state, reference = originals_file(family, options, shape)
    expected = logits_of(reference, WAVEFORM)
    parsed = parse_checkpoint(state)
    made = network_of(parsed)
    logits = made(WAVEFORM)[0]
    scale = float(expected.abs().max())
    assert (logits - expected).abs().max().item() <= 1e-5 * scale
    dense = network_of(dataclasses.replace(parsed, scores={}))
    assert (dense(WAVEFORM)[0] - expected).abs().max().item() > 1e-2 * scale, "the masks have no effect"


@pytest.mark.parametrize(("family", "options"), CASES[:3], ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_a_run_takes_up_the_originals_file(family: str, options: dict[str, Any]) -> None:
    """As fairseq's trainer does it, into a network that was built from the same options."""
    state, reference = originals_file(family, options, "base")
    parsed = parse_checkpoint(state)
    made = MaskedNetwork(parsed.config, len(parsed.head_state["weight"]))
    made.add_masks(MaskOptions.from_mapping(parsed.model_options))
    adopt_state(made, {name.removeprefix("w2v_encoder."): value for name, value in state["model"].items()})
    expected = logits_of(reference, WAVEFORM)
    torch.testing.assert_close(made.eval()(WAVEFORM)[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# ---------------------------------------------------------------- rebuilding from a file


def parsed_checkpoint(made: MaskedNetwork, **options: Any) -> ParsedCheckpoint:
    state = made.state_dict()
    return ParsedCheckpoint(
        family="wav2vec2",
        config=made.w2v_model.config,
        encoder_state={
            n.removeprefix("w2v_model."): v for n, v in without_scores(state).items() if n.startswith("w2v")
        },
        normalize=False,
        head_state={"weight": state["proj.weight"], "bias": state["proj.bias"]},
        scores={n.removesuffix(SCORES): v for n, v in state.items() if n.endswith(SCORES)},
        model_options={"prune_rate": 0.5, **options},
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "rows", "columns"])
def test_a_network_is_rebuilt_from_its_file(pattern: str) -> None:
    made = network(mask_pattern=pattern, no_prune_proj=False).eval()
    made.load_state_dict(filled(made, 3))
    parsed = parsed_checkpoint(made, mask_pattern=pattern, no_prune_proj=False)
    again = network_of(parsed)
    assert not again.training
    torch.testing.assert_close(again(WAVEFORM)[0], made(WAVEFORM)[0], rtol=0, atol=0)
    masks = read_masks(parsed)
    assert masks.keys() == made.masked_modules().keys()
    for name, module in made.masked_modules().items():
        assert torch.equal(masks[name], module.mask())


def test_a_checkpoint_with_masks_becomes_dense() -> None:
    made = network(no_prune_pos=False).eval()
    parsed = parsed_checkpoint(made, no_prune_pos=False)
    dense = baked(parsed)
    assert dense.scores == {} and read_masks(dense) == {}
    torch.testing.assert_close(network_of(dense)(WAVEFORM)[0], made(WAVEFORM)[0], rtol=1e-5, atol=1e-5)
    assert baked(dense) is dense


def test_a_file_whose_scores_do_not_fit_its_options() -> None:
    parsed = parsed_checkpoint(network(), mask_pattern="rows")
    with pytest.raises(ValueError, match=r"the masks of best.pt cannot be read: the scores of .* must have the shape"):
        baked(parsed, "best.pt")
    with pytest.raises(ValueError, match=r"has no head \(w2v_encoder.proj\); masks are trained with one"):
        network_of(dataclasses.replace(parsed, head_state=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_rate": "abc"}, r"`prune_rate` must be a number, but is 'abc'; its configuration is damaged"),
        ({"prune_rate": None}, r"`prune_rate` must be a number, but is None"),
        ({"prune_rate": float("nan")}, r"`prune_rate` is the kept fraction and must be in \(0, 1\], but is nan"),
        ({"fix_mask_before": "x"}, r"`fix_mask_before` must be a number, but is 'x'"),
        ({"load_mask_before": [1]}, r"`load_mask_before` must be a number, but is \[1\]"),
        ({"layerwise_prune_rate": 3}, r"`layerwise_prune_rate` must be a list of numbers, or null, but is 3"),
        ({"layerwise_prune_rate": "abc"}, r"`layerwise_prune_rate` must be a list of numbers, or null, but is 'abc'"),
        ({"fc_attn_prune_rate": [0.5, None]}, r"`fc_attn_prune_rate` must be a list of numbers.*but is \[0\.5, None\]"),
        ({"mask_pattern": ["rows"]}, r"`mask_pattern` must be one of"),
    ],
)
def test_damaged_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    parsed = parsed_checkpoint(network(), **options)
    for read in (baked, read_masks, network_of):
        with pytest.raises(ValueError, match=rf"^the masks of best\.pt cannot be read: {message}"):
            read(parsed, "best.pt")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1, 2], "must be a tensor of floats, but are list; take another copy of the checkpoint"),
        (torch.ones(48, 32, dtype=torch.int64), r"must be a tensor of floats, but are torch\.int64"),
        (torch.full((48, 32), torch.nan), "must be numbers, but hold NaN: .* diverged; take an earlier checkpoint"),
    ],
)
def test_damaged_scores_are_refused_by_name(scores: Any, message: str) -> None:
    parsed = parsed_checkpoint(network())
    parsed.scores[FC1] = scores
    for read in (baked, read_masks, network_of):
        with pytest.raises(ValueError, match=rf"the masks of best\.pt cannot be read: the scores of {FC1} {message}"):
            read(parsed, "best.pt")


def test_a_damaged_head_is_refused_by_name() -> None:
    parsed = dataclasses.replace(
        parsed_checkpoint(network()), head_state={"weight": torch.ones(4), "bias": torch.ones(4)}
    )
    with pytest.raises(
        ValueError, match=r"of best\.pt cannot be read: the head's weight must be \[outputs, width\], but"
    ):
        network_of(parsed, "best.pt")


def test_a_dense_checkpoint_has_no_masks() -> None:
    assert read_masks(dataclasses.replace(parsed_checkpoint(network()), scores={})) == {}
