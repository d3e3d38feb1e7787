"""SpecAugment-style masks over frames and channels, with fairseq's options, drawn from generators that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s3distill.encoder.training_config import MaskConfig

Generator = np.random.Generator


def span_mask(
    sizes: Sequence[int],
    width: int,
    prob: float,
    length: int,
    rngs: Sequence[Generator],
    selection: str = "static",
    other: float = 0.0,
    min_masks: int = 0,
    no_overlap: bool = False,
    min_space: int = 1,
    require_same_masks: bool = True,
    mask_dropout: float = 0.0,
) -> npt.NDArray[np.bool_]:
    """Random spans per row  (Baevski et al., 2020, section 3.1; fairseq's `compute_mask_indices`).

    A row of n valid positions gets floor(prob * n / length + u) spans, u ~ U(0, 1), at least ``min_masks``. Given the
    same generators the result is fairseq's, where fairseq has one: rows too short for a span raise there and are masked
    as far as one position stays open here; ``uniform`` and ``no_overlap``, which its current code cannot run, work.

    Args:
        sizes: valid positions per row.
        width: positions per row, padding included.
        prob: share of positions that start inside a span, before overlaps.
        selection: lengths are ``static``, or drawn from ``uniform`` [other, 2 * length], ``normal`` (std other) or ``poisson``.
        rngs: one generator per row; the last one also evens out the counts, as in fairseq.
        require_same_masks: randomly unmask until all rows have equally many masked positions.
        mask_dropout: share of masked positions that are opened again.
    Returns:
        [rows, width] bool, True = masked.
    """
    chosen: list[npt.NDArray[np.int64]] = []
    for size, rng in zip(sizes, rngs, strict=True):
        num_spans = max(min_masks, int(prob * size / float(length) + rng.random()))
        if num_spans == 0 or size < 2:
            chosen.append(np.zeros(0, dtype=np.int64))
            continue
        lengths = _span_lengths(num_spans, length, selection, other, size, rng)
        if no_overlap:
            positions = _disjoint_spans(lengths, size, min_space, rng)
        else:
            shortest = min(lengths)
            if size - shortest <= num_spans:
                shortest = size - num_spans - 1  # below 0 some spans start behind the row, as in fairseq
            starts = rng.choice(size - shortest, num_spans, replace=False)
            positions = np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])
        positions = np.unique(positions[positions < size])
        if len(positions) >= size:
            positions = np.delete(positions, rng.integers(size))
        chosen.append(positions)

    mask = np.zeros((len(sizes), width), dtype=bool)
    target = min((len(p) for p in chosen), default=0) if require_same_masks else None
    for i, positions in enumerate(chosen):
        if target is not None and len(positions) > target:
            positions = rngs[-1].choice(positions, target, replace=False)
        mask[i, positions] = True
        if mask_dropout > 0:
            masked = np.flatnonzero(mask[i])
            holes = rngs[-1].choice(masked, int(np.rint(len(masked) * mask_dropout)), replace=False)
            mask[i, holes] = False
    return mask


def _span_lengths(
    num_spans: int, length: int, selection: str, other: float, size: int, rng: Generator
) -> npt.NDArray[np.int64]:
    if selection == "static":
        return np.full(num_spans, length)
    if selection == "uniform":
        lengths = rng.integers(int(other), length * 2 + 1, size=num_spans)
    elif selection == "normal":
        lengths = np.maximum(1, np.rint(rng.normal(length, other, size=num_spans))).astype(np.int64)
    elif selection == "poisson":
        lengths = rng.poisson(length, size=num_spans)
    else:
        raise ValueError(f"mask selection must be one of static, uniform, normal, poisson, but is {selection!r}")
    if lengths.sum() == 0:
        lengths[:] = min(length, size - 1)
    return lengths


def _disjoint_spans(lengths: npt.NDArray[np.int64], size: int, min_space: int, rng: Generator) -> npt.NDArray[np.int64]:
    """Places spans, longest first, into the free stretches, ``min_space`` apart; what no longer fits is left out."""
    free, positions = [(0, size)], []
    shortest = int(lengths.min())
    for length in sorted(map(int, lengths), reverse=True):
        room = np.array([end - start if end - start >= length else 0 for start, end in free], dtype=float)
        if room.sum() == 0:
            break
        start, end = free.pop(int(rng.choice(len(free), p=room / room.sum())))
        first = int(rng.integers(start, end - length + 1))
        positions.append(np.arange(first, first + length))
        if first - min_space - start >= shortest:
            free.append((start, first - min_space))
        if end - (first + length + min_space) >= shortest:
            free.append((first + length + min_space, end))
    return np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)


def _row_generators(num_rows: int) -> list[Generator]:
    """Fresh generators that torch's random state decides; the trainer seeds that per update, so a resumed run repeats them."""
    seeds = torch.randint(2**31, (num_rows,)).tolist()
    return [np.random.default_rng(seed) for seed in seeds]


def mask_channels(x: Tensor, config: MaskConfig) -> Tensor:
    """Zeroes random spans of channels over all frames; x [B, T, C] -> [B, T, C]."""
    if config.mask_channel_prob <= 0:
        return x
    batch, _, channels = x.shape
    mask = span_mask(
        [channels] * batch,
        channels,
        config.mask_channel_prob,
        config.mask_channel_length,
        _row_generators(batch),
        config.mask_channel_selection,
        config.mask_channel_other,
        no_overlap=config.no_mask_channel_overlap,
        min_space=config.mask_channel_min_space,
    )
    return x.masked_fill(torch.from_numpy(mask).to(x.device)[:, None, :], 0)


def mask_frames(
    x: Tensor, mask_emb: Tensor, padding_mask: Tensor | None, config: MaskConfig
) -> tuple[Tensor, Tensor | None]:
    """Replaces random spans of frames by ``mask_emb`` [C].

    Returns:
        x [B, T, C] and the mask [B, T] (True = masked), or None when ``mask_prob`` is 0.
    """
    if config.mask_prob <= 0:
        return x, None
    batch, frames, _ = x.shape
    sizes = [frames] * batch if padding_mask is None else (~padding_mask).sum(-1).tolist()
    masked = draw_frame_mask(sizes, frames, config, _row_generators(batch)).to(x.device)
    return replace_frames(x, mask_emb, masked), masked


def replace_frames(x: Tensor, mask_emb: Tensor, masked: Tensor) -> Tensor:
    """``mask_emb`` [C] where ``masked`` [B, T] is True, ``x`` [B, T, C] elsewhere."""
    return torch.where(masked[:, :, None], mask_emb.to(x.dtype), x)


def draw_frame_mask(sizes: Sequence[int], width: int, config: MaskConfig, rngs: Sequence[Generator]) -> Tensor:
    """Random spans of frames, at least two per row.

    Args:
        sizes: valid frames per row.
        width: frames per row, padding included.
        rngs: one generator per row. A row's mask depends on its own generator and size only, unless
            ``config.require_same_masks`` evens the rows out.
    Returns:
        [rows, width] bool on the CPU, True = masked.
    """
    mask = span_mask(
        sizes,
        width,
        config.mask_prob,
        config.mask_length,
        rngs,
        config.mask_selection,
        config.mask_other,
        min_masks=2,
        no_overlap=config.no_mask_overlap,
        min_space=config.mask_min_space,
        require_same_masks=config.require_same_masks,
        mask_dropout=config.mask_dropout,
    )
    return torch.from_numpy(mask)
