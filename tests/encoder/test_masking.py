"""Time and channel masks: fairseq's own with the same generators, and what must hold where fairseq has none."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.masking import mask_channels, mask_frames, span_mask
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.training_config import MaskConfig

SIZES = st.lists(st.integers(2, 60), min_size=1, max_size=4)


def generators(num_rows: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, row]) for row in range(num_rows)]


def fairseqs(sizes: list[int], width: int, prob: float, length: int, seed: int, **options: Any) -> np.ndarray:
    """fairseq's mask; it makes each row's generator from a hash of (seed, epoch, index)."""
    data_utils = pytest.importorskip("fairseq.data.data_utils")
    padding_mask = None
    if min(sizes) < width:
        padding_mask = torch.arange(width) >= torch.tensor(sizes)[:, None]
    return data_utils.compute_mask_indices(
        (len(sizes), width),
        padding_mask,
        prob,
        length,
        seed=seed,
        epoch=1,
        indices=torch.arange(len(sizes)),
        **options,
    )


def ours(sizes: list[int], width: int, prob: float, length: int, seed: int, **options: Any) -> np.ndarray:
    rngs = [np.random.default_rng(int(hash((seed, 1, index)) % 1e6)) for index in range(len(sizes))]
    if "mask_type" in options:
        options["selection"] = options.pop("mask_type")
        options["other"] = options.pop("mask_other")
    return span_mask(sizes, width, prob, length, rngs, **options)


@pytest.mark.parametrize("require_same_masks", [True, False])
@pytest.mark.parametrize("mask_dropout", [0.0, 0.3])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("mask_type", "mask_other"), [("static", 0.0), ("normal", 3.0), ("poisson", 0.0)])
def test_masks_are_fairseqs(
    mask_type: str, mask_other: float, padded: bool, mask_dropout: float, require_same_masks: bool
) -> None:
    options: dict[str, Any] = dict(mask_type=mask_type, mask_other=mask_other, min_masks=2)
    options.update(mask_dropout=mask_dropout, require_same_masks=require_same_masks)
    sizes = [200, 163, 77, 120] if padded else [200] * 4
    for seed in range(20):
        theirs = fairseqs(sizes, 200, 0.65, 10, seed, **options)
        assert theirs.any()
        np.testing.assert_array_equal(ours(sizes, 200, 0.65, 10, seed, **options), theirs)


@settings(deadline=None, max_examples=150)
@given(
    sizes=SIZES,
    prob=st.floats(0.05, 1.0),
    length=st.integers(1, 12),
    selection=st.sampled_from([("static", 0.0), ("normal", 2.0), ("poisson", 0.0)]),
    min_masks=st.integers(0, 3),
    same=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_masks_are_fairseqs_wherever_fairseq_has_one(
    sizes: list[int], prob: float, length: int, selection: tuple[str, float], min_masks: int, same: bool, seed: int
) -> None:
    options: dict[str, Any] = dict(mask_type=selection[0], mask_other=selection[1])
    options.update(min_masks=min_masks, require_same_masks=same)
    try:
        theirs = fairseqs(sizes, max(sizes), prob, length, seed, **options)
    except (ValueError, IndexError):  # a row that is too short for its spans, or spans without length
        theirs = None
    mask = ours(sizes, max(sizes), prob, length, seed, **options)
    assert all(not mask[i, :size].all() for i, size in enumerate(sizes))
    assume(theirs is not None)
    np.testing.assert_array_equal(mask, theirs)


@pytest.mark.parametrize("no_overlap", [False, True])
@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    prob=st.floats(0.01, 1.0),
    length=st.integers(1, 30),
    selection=st.sampled_from([("static", 0.0), ("uniform", 0.0), ("uniform", 2.0), ("normal", 9.0), ("poisson", 0.0)]),
    min_space=st.integers(0, 3),
    dropout=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_no_size_raises_and_a_position_stays_open(
    no_overlap: bool,
    sizes: list[int],
    prob: float,
    length: int,
    selection: tuple[str, float],
    min_space: int,
    dropout: float,
    seed: int,
) -> None:
    width = max(sizes) + 3
    mask = span_mask(
        sizes,
        width,
        prob,
        length,
        generators(len(sizes), seed),
        *selection,
        min_masks=2,
        no_overlap=no_overlap,
        min_space=min_space,
        mask_dropout=dropout,
    )
    assert mask.shape == (len(sizes), width)
    for row, size in zip(mask, sizes, strict=True):
        assert not row[size:].any(), "padding is masked"
        assert size == 0 or not row[:size].all()
    assert len({int(row.sum()) for row in mask}) == 1, "require_same_masks"


def test_a_short_row_is_still_masked() -> None:
    mask = span_mask([5] * 50, 5, 0.65, 10, generators(50), min_masks=2, require_same_masks=False)
    assert mask.sum(1).min() >= 1 and mask.sum(1).max() <= 4


def spans(row: np.ndarray) -> list[tuple[int, int]]:
    """(first, behind the last) of every run of masked positions."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("min_space", [1, 2, 5])
@pytest.mark.parametrize(("selection", "other"), [("static", 0.0), ("normal", 3.0), ("uniform", 4.0)])
def test_spans_without_overlap_are_apart(selection: str, other: float, min_space: int) -> None:
    mask = span_mask(
        [300] * 60,
        300,
        0.5,
        10,
        generators(60),
        selection,
        other,
        no_overlap=True,
        min_space=min_space,
        require_same_masks=False,
    )
    lengths, gaps = [], []
    for row in mask:
        runs = spans(row)
        lengths += [end - start for start, end in runs]
        gaps += [start - end for (_, end), (start, _) in itertools.pairwise(runs)]
    assert min(gaps) >= min_space, "spans touch or stand too close"
    assert min(gaps) < min_space + 3, "spans that stand as close as they may are found, too"
    if selection == "static":
        assert set(lengths) == {10}
        assert np.mean([len(spans(row)) for row in mask]) > 13  # 15 or 16 are asked for; nearly all find a place
    if selection == "uniform":
        assert min(lengths) == 4 and max(lengths) == 20


def test_spans_without_overlap_or_space_may_touch_and_fill_the_row() -> None:
    mask = span_mask([20] * 200, 20, 1.0, 10, generators(200), no_overlap=True, min_space=0, require_same_masks=False)
    masked = mask.sum(1)
    assert set(masked.tolist()) <= {10, 19}, "one span of 10, or two that fill the row but for the position that opens"
    assert {10, 19} <= set(masked.tolist())


def test_uniform_lengths_are_as_promised() -> None:
    mask = span_mask([400] * 300, 400, 0.01, 10, generators(300), "uniform", 5.0, require_same_masks=False)
    single = [end - start for row in mask if len(spans(row)) == 1 for start, end in spans(row) if end < 400]
    assert len(single) > 50
    assert min(single) >= 5 and max(single) > 14
    assert np.mean([n for n in single if n <= 20]) == pytest.approx(12.5, abs=1.5)


@pytest.mark.parametrize("prob", [0.2, 0.65])
def test_share_of_masked_positions(prob: float) -> None:
    width, length = 2000, 10
    mask = span_mask([width] * 40, width, prob, length, generators(40), require_same_masks=False)
    # a position stays open if none of the n spans starts in the `length` positions up to it
    num_spans = prob * width / length
    expected = 1 - (1 - num_spans / (width - length)) ** length
    assert mask.mean() == pytest.approx(expected, abs=0.01)
    dropped = span_mask([width] * 40, width, prob, length, generators(40), require_same_masks=False, mask_dropout=0.25)
    assert dropped.mean() == pytest.approx(0.75 * mask.mean(), abs=0.002)


def test_an_unknown_selection_is_named() -> None:
    with pytest.raises(ValueError, match="must be one of static, uniform, normal, poisson, but is 'gauss'"):
        span_mask([50], 50, 0.5, 10, generators(1), "gauss")


CONFIG = MaskConfig(mask_prob=0.5, mask_length=4, mask_channel_prob=0.3, mask_channel_length=3)


def test_frames_are_replaced_inside_valid_ones_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 8)
    padding_mask = torch.arange(50) >= torch.tensor([50, 30, 41])[:, None]
    mask_emb = torch.full((8,), 7.0)
    masked_x, masked = mask_frames(x, mask_emb, padding_mask, CONFIG)
    assert masked is not None and masked.any(1).all() and not (masked & padding_mask).any()
    assert torch.equal(masked_x[masked], mask_emb.expand(int(masked.sum()), 8))
    assert torch.equal(masked_x[~masked], x[~masked])
    assert len(set(masked.sum(1).tolist())) == 1


def test_two_spans_are_masked_at_least() -> None:
    x = torch.zeros(1, 400, 4)
    config = MaskConfig(mask_prob=1e-6, mask_length=5)
    num_masked = [int(mask_frames(x, torch.ones(4), None, config)[1].sum()) for _ in range(20)]
    assert max(num_masked) == 10 and min(num_masked) >= 6


def test_channels_are_zero_over_all_frames() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 20, 32)
    masked = mask_channels(x, CONFIG)
    zero = (masked == 0).all(1)  # [B, C]
    assert zero.any(1).all() and not zero.all()
    assert torch.equal(masked, x.masked_fill(zero[:, None, :], 0))
    assert len({tuple(row) for row in zero.tolist()}) > 1, "each utterance has channels of its own"


def test_without_probability_nothing_is_masked() -> None:
    x = torch.randn(2, 20, 8)
    off = MaskConfig()
    assert mask_channels(x, off) is x
    assert mask_frames(x, torch.zeros(8), None, off) == (x, None)


def tiny_encoder(masking: MaskConfig) -> SpeechEncoder:
    torch.manual_seed(3)
    config = EncoderConfig(
        (ConvLayerConfig(8, 10, 5), ConvLayerConfig(8, 4, 4)),
        16,
        uniform_layers(1, 2, 8, 16),
        pos_conv_kernel=4,
        pos_conv_groups=2,
    )
    return SpeechEncoder(config, masking=masking)


def test_torchs_seed_decides_the_masks_of_an_encoder() -> None:
    encoder = tiny_encoder(CONFIG)
    source = torch.randn(2, 2000)
    masks = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        masks.append(encoder(source, mask=True).masked)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert encoder(source).masked is None


def test_channels_can_be_masked_before_frames() -> None:
    """Frames that are masked afterwards hold the whole embedding; masked before, its channels are zero, too."""
    entered = []
    for before in (True, False):
        encoder = tiny_encoder(dataclasses.replace(CONFIG, mask_channel_before=before, mask_channel_prob=0.6))
        encoder.mask_emb.data.fill_(3.0)
        encoder.encoder.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        torch.manual_seed(1)
        masked = encoder(torch.randn(2, 2000), mask=True).masked
        entered[-1] = entered[-1][masked]
    assert (entered[0] == 3).all()
    assert set(entered[1].unique().tolist()) == {0.0, 3.0}


def test_the_mask_embedding_learns() -> None:
    encoder = tiny_encoder(CONFIG)
    encoder(torch.randn(2, 2000), mask=True).x.square().sum().backward()
    assert encoder.mask_emb.grad is not None and encoder.mask_emb.grad.abs().sum() > 0
    encoder.mask_emb.grad = None
    encoder(torch.randn(2, 2000)).x.square().sum().backward()
    assert encoder.mask_emb.grad is None
