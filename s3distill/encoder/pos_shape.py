"""What pruning leaves of the residual stream's channels and of the positional convolution, as numbers: part of `EncoderConfig`.

A grouped convolution ties the channels of a group together, so that channels are counted per group: those of the stream,
which it reads and adds to, and those of each convolution in between (data2vec's stack).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class PosConvShape:
    """A positional convolution whose groups differ in size.

    Attributes:
        inputs: channels of the residual stream per group; consecutive ones, so that they add up to ``embed_dim``.
        hidden: outputs of all convolutions of the stack but the last, each a tuple of channels per group.
        written: channels of the stream that outputs of the last convolution are added to, ascending; each output belongs to
            the group of its channel. Empty: there is no positional convolution any more.
    """

    inputs: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    written: tuple[int, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PosConvShape:
        """From what JSON makes of it: lists for tuples."""
        hidden = tuple(tuple(int(n) for n in block) for block in values["hidden"])
        return cls(tuple(map(int, values["inputs"])), hidden, tuple(map(int, values["written"])))


class HasStream(Protocol):
    """What this file reads of an `EncoderConfig`."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def pos_conv_groups(self) -> int: ...
    @property
    def pos_conv_depth(self) -> int: ...
    @property
    def pos_conv_shape(self) -> PosConvShape | None: ...


def check_pos_conv(config: HasStream) -> None:
    """Raises ValueError where a config's groups do not add up."""
    dim, groups, depth = config.embed_dim, config.pos_conv_groups, config.pos_conv_depth
    shape = config.pos_conv_shape
    if shape is None:
        if dim % groups != 0:
            raise ValueError(f"`embed_dim` ({dim}) must be a multiple of `pos_conv_groups` ({groups})")
        return
    if len(shape.inputs) != groups or min(shape.inputs) < 0 or sum(shape.inputs) != dim:
        raise ValueError(
            f"`inputs` of `pos_conv_shape` must be the channels of {groups} groups, {dim} in all (`embed_dim`), but is {shape.inputs}"
        )
    if len(shape.hidden) != depth - 1 or any(len(block) != groups or min(block) < 0 for block in shape.hidden):
        raise ValueError(
            f"`hidden` of `pos_conv_shape` must have the channels of {groups} groups for each of the {depth - 1} inner convolutions, "
            f"but is {shape.hidden}"
        )
    if list(shape.written) != sorted(set(shape.written)) or any(not 0 <= c < dim for c in shape.written):
        raise ValueError(
            f"`written` of `pos_conv_shape` must name different channels of the stream, 0 to {dim - 1}, in ascending order, but is "
            f"{shape.written}"
        )
    if not shape.written:
        return
    for incoming, outgoing in itertools.pairwise([shape.inputs, *pos_conv_outputs(config)]):
        starved = [g for g, (i, o) in enumerate(zip(incoming, outgoing, strict=True)) if i == 0 < o]
        if starved:
            raise ValueError(
                f"groups of `pos_conv_shape` with outputs need inputs in every convolution, but groups {starved} have none"
            )


def stream_groups(config: HasStream) -> tuple[int, ...]:
    """Channels of the residual stream per group of the positional convolution."""
    if config.pos_conv_shape is not None:
        return config.pos_conv_shape.inputs
    return (config.embed_dim // config.pos_conv_groups,) * config.pos_conv_groups


def written_channels(config: HasStream) -> tuple[int, ...]:
    """Channel of the stream that each output of the last positional convolution is added to."""
    shape = config.pos_conv_shape
    return tuple(range(config.embed_dim)) if shape is None else shape.written


def groups_of(channels: tuple[int, ...], inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Group of each channel of the stream."""
    group_of_channel = [g for g, size in enumerate(inputs) for _ in range(size)]
    return tuple(group_of_channel[channel] for channel in channels)


def pos_conv_outputs(config: HasStream) -> tuple[tuple[int, ...], ...]:
    """Outputs per convolution of the stack and group."""
    inputs, shape = stream_groups(config), config.pos_conv_shape
    if shape is None:
        return (inputs,) * config.pos_conv_depth
    owners = groups_of(shape.written, inputs)
    return (*shape.hidden, tuple(owners.count(g) for g in range(len(inputs))))


def group_starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each group begins, and the end: (0, n_0, n_0 + n_1, ...)."""
    return tuple(itertools.accumulate(sizes, initial=0))
