"""The masked network: what learns under each option, what does not move, and how far down gradients go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s3distill.encoder.config import EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.training_config import MaskConfig, TrainingConfig
from s3distill.masks.network import MaskedNetwork, check_something_learns, trained_names
from s3distill.masks.options import MaskOptions

CONFIG = EncoderConfig(
    conv_layers=parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"),
    embed_dim=32,
    layers=uniform_layers(3, 4, 8, 48),
    pos_conv_kernel=16,
    pos_conv_groups=4,
    extractor_mode="layer_norm",
    conv_bias=True,
)
PRUNED_LAYERS = (
    LayerConfig(4, 8, 48),
    LayerConfig(4, 8, 20, attention=False),
    LayerConfig(0, 8, 48),
    LayerConfig(1, 8, 48, ffn=False),
    LayerConfig(2, 8, 0),
)
SHAPES = {
    "post-LN": CONFIG,
    "pre-LN": dataclasses.replace(CONFIG, layer_norm_first=True),
    "GroupNorm": dataclasses.replace(CONFIG, extractor_mode="default", conv_bias=False),
    "data2vec": dataclasses.replace(CONFIG, pos_conv_depth=3, pos_conv_kernel=15),
    "pruned, post-LN": dataclasses.replace(CONFIG, layers=PRUNED_LAYERS),
    "pruned, pre-LN": dataclasses.replace(CONFIG, layers=PRUNED_LAYERS, layer_norm_first=True),
    "2 layers": dataclasses.replace(CONFIG, layers=uniform_layers(2, 2, 4, 12)),
    "12 layers": dataclasses.replace(CONFIG, layers=uniform_layers(12, 2, 4, 12)),
    "24 layers": dataclasses.replace(CONFIG, layers=uniform_layers(24, 2, 4, 12), layer_norm_first=True),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
WAVEFORM = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
EVERYTHING = {"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False}


def dense(config: EncoderConfig = CONFIG, **options: Any) -> MaskedNetwork:
    """All parameters random, so that each has an effect."""
    torch.manual_seed(0)
    made = MaskedNetwork(config, 7, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def network(config: EncoderConfig = CONFIG, training: TrainingConfig | None = None, **options: Any) -> MaskedNetwork:
    made = dense(config, training=training)
    made.add_masks(MaskOptions(**{"prune_rate": 0.5, **options}))
    return made


def learning(made: nn.Module) -> set[str]:
    """What learns beside the scores, `mask_emb` left out."""
    return {name for name in trained_names(made) if not name.endswith(".scores")}


def parameters_of(*modules: str, kinds: Iterable[str] = ("weight", "bias")) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in kinds}


def layer_names(*modules: str, num_layers: int = 3) -> list[str]:
    return [f"w2v_model.encoder.layers.{i}.{module}" for i in range(num_layers) for module in modules]


NORMS = [
    "w2v_model.layer_norm",
    "w2v_model.encoder.layer_norm",
    *layer_names("self_attn_layer_norm", "final_layer_norm"),
]
ATTENTION = layer_names(*(f"self_attn.{name}_proj" for name in "qkv"), "self_attn.out_proj")
EXTRACTOR = [f"w2v_model.feature_extractor.conv_layers.{i}.{place}" for i in range(7) for place in ("0", "2.1")]
POS = {f"w2v_model.encoder.pos_conv.0.{name}" for name in ("weight_g", "weight_v", "bias")}
ALL_BIASES = {
    f"{m}.bias"
    for m in (
        *(*NORMS, *ATTENTION, *EXTRACTOR, *layer_names("fc1", "fc2")),
        *("w2v_model.post_extract_proj", "w2v_model.encoder.pos_conv.0", "proj"),
    )
}
WITHOUT_MASKS = {"fix_attn": True, "no_prune_post_extract_proj": True}  # of the layers only the FFN is masked

WHAT_LEARNS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"trainable_proj": True}, {"proj.weight", "proj.bias"}),
    ({"trainable_post_extract_proj": True}, parameters_of("w2v_model.post_extract_proj")),
    ({"trainable_pos": True}, POS),
    ({"trainable_layer_norm": True}, parameters_of(*NORMS)),
    ({"trainable_bias": True}, ALL_BIASES),
    ({"trainable_proj": True, "trainable_bias": True}, {"proj.weight"} | ALL_BIASES),
    # masked modules whose weights learn as well
    ({"trainable_proj": True, "no_prune_proj": False}, {"proj.weight", "proj.bias"}),
    ({"trainable_pos": True, "no_prune_pos": False}, POS),
    (
        {"trainable_if_unpruned": True, **WITHOUT_MASKS},
        parameters_of(*NORMS, *ATTENTION, *EXTRACTOR, "w2v_model.post_extract_proj", "proj") | POS,
    ),
    ({"trainable_if_unpruned": True, **EVERYTHING}, parameters_of(*NORMS, *EXTRACTOR[1::2])),
]


@pytest.mark.parametrize(("options", "expected"), WHAT_LEARNS, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_what_learns_beside_the_scores(options: dict[str, Any], expected: set[str]) -> None:
    """By exact place: in the original ``trainable_proj`` also hits k_proj and its like."""
    made = network(**options)
    assert learning(made) == expected
    scores = {name for name, p in made.named_parameters() if name.endswith(".scores") and p.requires_grad}
    assert scores == {f"{name}.scores" for name in made.masked_modules()} and scores
    assert made.w2v_model.mask_emb.requires_grad


def test_co_train_lets_all_weights_learn() -> None:
    made = network(co_train=True, fix_mask=True, **EVERYTHING)
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.scores" for name in made.masked_modules()}
    assert not {name for name, p in network(co_train=True).named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("depth", [1, 3])
def test_the_positional_convolution_learns_in_both_forms(depth: int) -> None:
    config = dataclasses.replace(CONFIG, pos_conv_depth=depth, pos_conv_kernel=15)
    for no_prune_pos in (True, False):
        found = learning(network(config, trainable_pos=True, no_prune_pos=no_prune_pos))
        place = "w2v_model.encoder.pos_conv."
        assert found == {n for n, _ in dense(config).named_parameters() if n.startswith(place)} and found


def test_the_group_norm_learns_if_unpruned_but_is_no_layer_norm() -> None:
    name = "w2v_model.feature_extractor.conv_layers.0.2.weight"
    assert name in learning(network(SHAPES["GroupNorm"], trainable_if_unpruned=True))
    assert name not in learning(network(SHAPES["GroupNorm"], trainable_layer_norm=True))


@pytest.mark.parametrize(
    ("options", "learn"),
    [({}, {0, 1, 2}), ({"fix_mask": True}, set()), ({"fix_mask_before": 1}, {1, 2}), ({"fix_mask_before": 3}, set())],
)
def test_fixed_masks(options: dict[str, Any], learn: set[int]) -> None:
    modules = network(no_prune_proj=False, **options).masked_modules()
    found = {int(n.split(".")[3]) for n, m in modules.items() if ".layers." in n and m.scores.requires_grad}
    assert found == learn
    in_front = modules["w2v_model.post_extract_proj"].scores.requires_grad
    assert in_front == (options == {})
    assert modules["proj"].scores.requires_grad == ("fix_mask" not in options)


# ---------------------------------------------------------------- nothing learns


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prune_rate": 1.0}, ["no module is masked", "prune_rate=1", "model.trainable_proj=true"]),
        (
            {"fix_attn": True, "fix_fc": True, "no_prune_post_extract_proj": True},
            ["no module is masked", "fix_attn and fix_fc", "model.fix_attn=false or model.fix_fc=false"],
        ),
        ({"layerwise_prune_rate": [1.0] * 3}, ["no module is masked"]),
        (
            {"fix_mask": True},
            ["all 19 masks are fixed", "fix_mask=True", "fix_mask_before=0", "co_train=true", "eval_only"],
        ),
        ({"fix_mask_before": 3}, ["all 19 masks are fixed", "fix_mask_before=3"]),
    ],
)
def test_options_under_which_nothing_learns(options: dict[str, Any], parts: list[str]) -> None:
    made = network(**options)
    with pytest.raises(ValueError, match="nothing would be trained") as caught:
        check_something_learns(made, made.options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune_rate": 1.0, "trainable_proj": True},
        {"prune_rate": 1.0, "co_train": True},
        {"fix_mask": True, "trainable_bias": True},
        {"fix_mask": True, "trainable_if_unpruned": True},
        {"fix_mask_before": 3, "no_prune_proj": False},
        {"fix_mask_before": 2},
    ],
)
def test_options_under_which_something_learns(options: dict[str, Any]) -> None:
    made = network(**options)
    check_something_learns(made, made.options)


# ---------------------------------------------------------------- shapes


@each_shape
def test_every_shape_is_masked_trained_and_baked(shape: str) -> None:
    made = network(SHAPES[shape], **EVERYTHING, trainable_bias=True).train()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.1)
    first = made(WAVEFORM)[0].detach()
    made(WAVEFORM)[0].square().mean().backward()
    without = {n for n, p in made.named_parameters() if p.requires_grad and p.grad is None}
    # no mask over frames is applied; without heads, attention is the bias of its last projection
    dead = {n for n in without if ".layers.2.self_attn" in n}
    assert without - dead == {"w2v_model.mask_emb"} and (not dead or shape.startswith("pruned"))
    assert all(m.scores.grad is not None for m in made.masked_modules().values())
    optimizer.step()
    after = made(WAVEFORM)[0].detach()
    assert after.isfinite().all() and not torch.allclose(after, first)
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} is frozen"
    made.eval().bake()
    torch.testing.assert_close(made(WAVEFORM)[0], after, rtol=1e-5, atol=1e-5)


def test_what_pruning_took_away_has_no_scores() -> None:
    made = network(SHAPES["pruned, pre-LN"], prune_rate=0.5)
    found = {
        i: sorted(n.split(f"layers.{i}.")[1] for n in made.masked_modules() if f"layers.{i}." in n) for i in range(5)
    }
    attention = [f"self_attn.{n}_proj" for n in ("k", "out", "q", "v")]
    assert found == {0: ["fc1", "fc2", *attention], 1: ["fc1", "fc2"], 2: ["fc1", "fc2"], 3: attention, 4: attention}


def test_density_per_layer_is_what_the_masks_keep() -> None:
    made = network(layerwise_prune_rate=[0.9, 1.0, 0.25])
    modules = made.masked_modules()
    shares = {name: float(module.mask().float().mean()) for name, module in modules.items()}
    assert len(shares) == 12
    for name, share in shares.items():
        assert share == pytest.approx(0.9 if ".layers.0." in name else 0.25, abs=1e-3)


def test_the_list_must_have_as_many_entries_as_layers() -> None:
    with pytest.raises(ValueError, match="`layerwise_prune_rate` must have one kept fraction for each of the 3"):
        network(layerwise_prune_rate=[0.5] * 12)


# ---------------------------------------------------------------- how far down gradients go


def graph(out: Any) -> list[bool]:
    """Whether a graph was built: conv features, what enters the first layer, and each layer's output."""
    return [out.features.grad_fn is not None, *(h.grad_fn is not None for h in out.hidden_states)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"no_prune_post_extract_proj": True}, [False, False, True, True, True]),
        ({}, [False, True, True, True, True]),
        ({"no_prune_extractor": False}, [True, True, True, True, True]),
        ({"fix_mask_before": 1}, [False, False, False, True, True]),
        ({"fix_mask_before": 2}, [False, False, False, False, True]),
        ({"fix_mask": True, "trainable_proj": True}, [False] * 5),
        ({"fix_mask": True, "trainable_pos": True}, [False, True, True, True, True]),
        ({"prune_rate": 1.0, "trainable_proj": True}, [False] * 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_frozen_lower_parts_build_no_graph(options: dict[str, Any], expected: list[bool], checkpointed: bool) -> None:
    made = network(training=TrainingConfig(checkpoint_activations=checkpointed), **options).train()
    logits, out = made(WAVEFORM)
    assert graph(out) == expected
    assert logits.grad_fn is not None
    logits.square().sum().backward()
    for name, module in made.masked_modules().items():
        assert (module.scores.grad is not None) == module.scores.requires_grad, name


def test_the_mask_embedding_learns_where_frames_are_masked() -> None:
    made = dense(masking=MaskConfig(mask_prob=0.5, mask_length=2))
    made.add_masks(MaskOptions(fix_mask=True, trainable_proj=True, prune_rate=0.5))
    made.train()
    logits, out = made(WAVEFORM, mask=True)
    assert graph(out) == [False, True, True, True, True]
    logits.square().sum().backward()
    assert bool(made.w2v_model.mask_emb.grad.any())


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_feature_grad_mult(scale: float) -> None:
    """0 stops gradients in front of the projection; otherwise they are scaled."""
    made = network(training=TrainingConfig(feature_grad_mult=scale), no_prune_extractor=False)
    made(WAVEFORM)[0].square().sum().backward()
    gradient = made.masked_modules()["w2v_model.feature_extractor.conv_layers.6.0"].scores.grad
    whole = network(no_prune_extractor=False)
    whole(WAVEFORM)[0].square().sum().backward()
    expected = whole.masked_modules()["w2v_model.feature_extractor.conv_layers.6.0"].scores.grad
    if scale == 0:
        assert gradient is None
    else:
        torch.testing.assert_close(gradient, scale * expected)


def test_a_frozen_encoder_leaves_the_head_to_learn() -> None:
    made = network(trainable_proj=True).train()
    logits, out = made(WAVEFORM, frozen_encoder=True)
    assert graph(out) == [False] * 5
    logits.sum().backward()
    assert {n for n, p in made.named_parameters() if p.grad is not None} == {"proj.weight", "proj.bias"}


def test_without_gradients_there_is_no_graph() -> None:
    made = network(co_train=True)
    with torch.no_grad():
        logits, out = made(WAVEFORM)
    assert graph(out) == [False] * 5 and logits.grad_fn is None


# ---------------------------------------------------------------- where scores start


def test_ranks_start_with_the_same_masks() -> None:
    """Whatever was drawn before: the noise depends on the seed and the module's name alone."""
    first = network()
    torch.manual_seed(0)
    torch.randn(1000)
    second = dense()
    torch.rand(17)
    second.add_masks(MaskOptions(prune_rate=0.5))
    for name, module in first.masked_modules().items():
        assert torch.equal(module.scores, second.masked_modules()[name].scores), name


def test_a_module_starts_the_same_whatever_else_is_masked() -> None:
    few, many = network(fix_attn=True), network(**EVERYTHING)
    for name, module in few.masked_modules().items():
        assert torch.equal(module.scores, many.masked_modules()[name].scores), name


def test_modules_and_seeds_start_differently() -> None:
    made = network()
    layers = [made.masked_modules()[f"w2v_model.encoder.layers.{i}.fc1"].scores for i in range(2)]
    assert not torch.equal(*layers)
    torch.manual_seed(1)
    made.reset_scores()
    again = copy.deepcopy(made)
    torch.manual_seed(2)
    again.reset_scores()
    for name, module in made.masked_modules().items():
        assert not torch.equal(module.scores, again.masked_modules()[name].scores), name


def test_starting_scores_draws_nothing_from_the_common_generator() -> None:
    """Otherwise dropout and data order would depend on how many modules are masked."""
    made = dense()
    torch.manual_seed(5)
    made.add_masks(MaskOptions(prune_rate=0.5))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("init", ["weight_rank", "weight_magnitude", "weight_magnitude_with_scale"])
def test_starts_from_the_weights_remove_the_smallest(init: str) -> None:
    made = network(init_score=init, init_score_scale=0.1, prune_rate=0.3, **EVERYTHING)
    for name, module in made.masked_modules().items():
        weight, mask = module.dense_weight().detach().abs(), module.mask()
        assert weight[mask].min() >= weight[~mask].max(), name


# ---------------------------------------------------------------- function


def effective(made: MaskedNetwork) -> dict[str, Tensor]:
    return {name: (module.dense_weight() * module.mask()).detach() for name, module in made.masked_modules().items()}


@each_shape
def test_a_dense_network_with_the_masked_weights_computes_the_same(shape: str) -> None:
    """Written into the plain modules by hand, positional convolution (g and v) left whole."""
    made = network(SHAPES[shape], no_prune_proj=False, no_prune_extractor=False).eval()
    reference = dense(SHAPES[shape]).eval()
    before = reference(WAVEFORM)[0]
    for name, weight in effective(made).items():
        reference.get_submodule(name).weight.data.copy_(weight)
    padding = torch.zeros(WAVEFORM.shape, dtype=torch.bool)
    padding[1, 3000:] = True
    for mask in (None, padding):
        torch.testing.assert_close(made(WAVEFORM, mask)[0], reference(WAVEFORM, mask)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, made(WAVEFORM)[0], atol=1e-3)


def test_padding_changes_nothing() -> None:
    made = network(**EVERYTHING).eval()
    padding = torch.zeros(1, 4000, dtype=torch.bool)
    padding[:, 3000:] = True
    alone = made(WAVEFORM[:1, :3000])[0]
    padded = made(WAVEFORM[:1], padding)[0][:, : alone.shape[1]]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_final_dropout_is_for_training() -> None:
    made = dense(final_dropout=0.5)
    made.add_masks(MaskOptions(prune_rate=0.5))
    assert not torch.equal(made.train()(WAVEFORM)[0], made(WAVEFORM)[0])
    assert torch.equal(made.eval()(WAVEFORM)[0], made(WAVEFORM)[0])


def test_masks_are_fitted_to_a_small_task() -> None:
    """Weights as they are; the scores and the head alone bring the loss down."""
    made = network(prune_rate=0.7, trainable_proj=False, no_prune_post_extract_proj=True).train()
    target = dense()  # a network with other weights, that has something to say
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
        wanted = target(WAVEFORM)[0]
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (made(WAVEFORM)[0] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
