"""The shape of a speech encoder: every number that the modules are built from, and nothing else.

One `EncoderConfig` describes teachers, gated students and compact students alike; heads and FFN widths are per layer,
so that a pruned model rebuilds from its own config.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s3distill.encoder.pos_shape import PosConvShape, check_pos_conv
from s3distill.encoder.variants import check_variants
from s3distill.heads.layer_heads import HeadsConfig

SAMPLE_RATE = 16_000  # Hz; every checkpoint of this family reads 16 kHz mono

EXTRACTOR_MODES = ("default", "layer_norm")  # fairseq's names: GroupNorm on layer 0 only / LayerNorm on every layer
MAX_CONV_LAYERS = 1000  # far above any model, see `parse_conv_layers`
ACTIVATIONS = ("gelu", "relu", "gelu_accurate", "tanh", "swish")


@dataclass(frozen=True)
class ConvLayerConfig:
    """One layer of the waveform extractor: output channels, kernel and stride in samples of its input.

    ``separable``: a depthwise convolution over time, then a pointwise one over channels.
    """

    channels: int
    kernel: int
    stride: int
    separable: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """One Transformer layer.

    ``attention=False`` means that the whole sub-layer is gone, bias included; ``num_heads=0`` with ``attention=True``
    leaves the constant ``out_proj.bias``. The same goes for ``ffn`` and ``ffn_dim``.

    ``position_heads`` says which heads of the unpruned model these are, one number per head, where the encoder has a shared
    position bias (WavLM): its column of the bias and its slice of the residual stream belong to a head. None without a bias.

    ``reuses_attention``: the layer has no projections of queries and keys; to its own values it applies the attention map of
    the nearest earlier layer that computed one (ARMHuBERT).
    """

    num_heads: int
    head_dim: int
    ffn_dim: int
    attention: bool = True
    ffn: bool = True
    position_heads: tuple[int, ...] | None = None
    reuses_attention: bool = False


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of a wav2vec 2.0 / HuBERT / data2vec-audio / WavLM encoder.

    Args:
        conv_layers: the waveform extractor, first layer first.
        embed_dim: width of the residual stream (``encoder_embed_dim`` in fairseq).
        layers: Transformer layers, first layer first.
        extractor_mode: ``default`` (GroupNorm per channel behind the first conv) or ``layer_norm``.
        layer_norm_first: pre-LN layers (True) or post-LN (False).
        project_features: whether `post_extract_proj` maps conv channels to ``embed_dim``.
        pos_conv_kernel, pos_conv_groups, pos_conv_depth: the positional convolution; depth 1 is wav2vec 2.0's
            weight-normed conv, a larger depth is data2vec's stack of ``depth`` plain convs with an affine-free LayerNorm.
        group_norm_over_padding: take the GroupNorm statistics over padded samples too, as fairseq does. False counts
            valid samples only, so that padding never changes a result.
        position_buckets, position_max_distance, position_heads: WavLM's relative position bias, which all layers share:
            buckets of distances (0 = no bias), the distance in frames from which all share the last bucket, and the
            columns, one per head of the unpruned model.
        pos_conv_shape: what pruning left of the positional convolution; None = all groups are equal and of the whole stream.
        position_channels, position_slice: which channels of the unpruned stream these are, ascending, and how many of them each
            head of the unpruned model has, where the stream of an encoder with a position bias was cut; None and 0 = all.
        time_reduction: frames that a Conv1d of this kernel and stride makes one of, in front of layer 0 (FitHuBERT); T frames
            become floor(T / r). 1 = none.
        shared: what layers have in common (ALBERT): ``none``, ``attention``, ``ffn`` (each without its LayerNorm) or ``all``.
        shared_group: consecutive layers that share, of which the first owns the parameters; the last group may be smaller.
            0 = all layers are one group.
        attention: ``full``; ``windowed``: ``attention_window`` frames on each side, but the first ``attention_global`` frames
            attend to all and are attended to by all (Longformer); ``linformer``: keys and values of at most
            ``linformer_max_frames`` frames are projected to ``linformer_dim`` ones.
        output: prediction heads that stay at inference (see `KeptHeads`): what the encoder gives is their prediction; None =
            the last layer's output.
    """

    conv_layers: tuple[ConvLayerConfig, ...]
    embed_dim: int
    layers: tuple[LayerConfig, ...]
    extractor_mode: str = "default"
    conv_bias: bool = False
    layer_norm_first: bool = False
    project_features: bool = True
    activation: str = "gelu"
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    pos_conv_depth: int = 1
    group_norm_over_padding: bool = False
    position_buckets: int = 0
    position_max_distance: int = 800
    position_heads: int = 0
    pos_conv_shape: PosConvShape | None = None
    position_channels: tuple[int, ...] | None = None
    position_slice: int = 0
    time_reduction: int = 1
    shared: str = "none"
    shared_group: int = 0
    attention: str = "full"
    attention_window: int = 0
    attention_global: int = 0
    linformer_dim: int = 0
    linformer_max_frames: int = 0
    output: HeadsConfig | None = None

    def __post_init__(self) -> None:
        _require(len(self.conv_layers) > 0, "`conv_layers` must name at least one layer, but is empty")
        _require(
            self.extractor_mode in EXTRACTOR_MODES,
            f"`extractor_mode` must be one of {', '.join(EXTRACTOR_MODES)}, but is {self.extractor_mode!r}",
        )
        _require(
            self.activation in ACTIVATIONS,
            f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is {self.activation!r}",
        )
        _require(self.embed_dim > 0, f"`embed_dim` must be positive, but is {self.embed_dim}")
        check_pos_conv(self)
        _require(
            self.project_features or self.conv_layers[-1].channels == self.embed_dim,
            f"without `project_features` the last conv layer's channels ({self.conv_layers[-1].channels}) must equal "
            f"`embed_dim` ({self.embed_dim})",
        )
        _require(
            self.output is None
            or (self.output.student_dim, self.output.num_student_layers) == (self.embed_dim, len(self.layers)),
            f"`output` heads must read {len(self.layers)} layers of width {self.embed_dim}, but were made for {self.output}",
        )
        for i, conv in enumerate(self.conv_layers):
            _require(
                min(conv.channels, conv.kernel, conv.stride) > 0,
                f"conv layer {i} must have positive channels, kernel and stride, but is {conv}",
            )
        for i, layer in enumerate(self.layers):
            _require(
                min(layer.num_heads, layer.ffn_dim) >= 0 and layer.head_dim > 0,
                f"layer {i} must have num_heads >= 0, head_dim > 0 and ffn_dim >= 0, but is {layer}",
            )
        if self.position_buckets == 0:
            biased = [i for i, layer in enumerate(self.layers) if layer.position_heads is not None]
            _require(
                self.position_heads == 0 and not biased and self.position_channels is None and self.position_slice == 0,
                f"without `position_buckets` there is no position bias, so `position_heads` must be left out, but is "
                f"{self.position_heads} and set in layers {biased}; so must `position_channels` and `position_slice`",
            )
        else:
            self._check_position_bias()
        check_variants(self)

    def _check_position_bias(self) -> None:
        # a quarter of the buckets are single distances, the others are logarithmic up to the maximum
        _require(
            self.position_buckets >= 4 and self.position_max_distance > self.position_buckets // 4,
            f"`position_buckets` must be 0 or at least 4, and `position_max_distance` more than a quarter of it, but they are "
            f"{self.position_buckets} and {self.position_max_distance}",
        )
        self._check_position_channels()
        _require(
            self.position_heads > 0
            and (self.position_channels is not None or self.embed_dim % self.position_heads == 0),
            f"`embed_dim` ({self.embed_dim}) must be a multiple of `position_heads`, the heads of the unpruned model, but that is "
            f"{self.position_heads}",
        )
        for i, layer in enumerate(self.layers):
            heads = layer.position_heads
            _require(
                heads is not None
                and len(heads) == len(set(heads)) == layer.num_heads
                and all(0 <= head < self.position_heads for head in heads),
                f"`position_heads` of layer {i} must name a different column of the position bias, 0 to {self.position_heads - 1}, "
                f"for each of its {layer.num_heads} heads, but is {heads}",
            )

    def _check_position_channels(self) -> None:
        channels = self.position_channels
        if channels is None:
            _require(
                self.position_slice == 0,
                f"`position_slice` goes with `position_channels` of a cut stream and must be 0 without, but is {self.position_slice}",
            )
            return
        width = self.position_slice * self.position_heads
        _require(
            len(channels) == self.embed_dim
            and list(channels) == sorted(set(channels))
            and 0 <= channels[0] <= channels[-1] < width,
            f"`position_channels` must name a different channel of the unpruned stream, 0 to {width - 1}, for each of the "
            f"{self.embed_dim} that are left, ascending, but is {channels}",
        )

    @property
    def position_slice_width(self) -> int:
        """Channels of the unpruned stream that each head's gate of the position bias reads."""
        return self.position_slice or self.embed_dim // self.position_heads

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def output_dim(self) -> int:
        """Width of what the encoder gives."""
        return self.embed_dim if self.output is None else self.output.teacher_dim

    @property
    def frame_convs(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride) of all convolutions that cut audio into frames, in their order; pointwise ones change nothing."""
        convs = [(conv.kernel, conv.stride) for conv in self.conv_layers]
        return tuple(conv for conv in [*convs, (self.time_reduction,) * 2] if conv != (1, 1))

    @property
    def frame_stride(self) -> int:
        """Samples between two frames of the hidden states (320, that is 20 ms, for the released models)."""
        stride = 1
        for _, conv_stride in self.frame_convs:
            stride *= conv_stride
        return stride

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees (400 for the released models); a shorter waveform has no frame at all."""
        field_size, stride = 1, 1
        for kernel, conv_stride in self.frame_convs:
            field_size += (kernel - 1) * stride
            stride *= conv_stride
        return field_size

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of the hidden states of ``num_samples`` (int or integer tensor of any shape): floor((n - k) / s) + 1 per conv."""
        return self.num_feature_frames(num_samples) // self.time_reduction

    def num_feature_frames(self, num_samples: Any) -> Any:
        """Frames that come out of the extractor, in front of the time reduction: those that masks and `features` have."""
        for conv in self.conv_layers:
            num_samples = (num_samples - conv.kernel) // conv.stride + 1
        return num_samples

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back; it is what checkpoints carry."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"encoder config has unknown keys {unknown}; known are {sorted(known)}. "
                "Was it written by a newer s3distill? Then upgrade."
            )
        fields = dict(values)
        fields["conv_layers"] = tuple(ConvLayerConfig(**c) for c in fields["conv_layers"])
        fields["layers"] = tuple(_layer_from_dict(layer) for layer in fields["layers"])
        if fields.get("pos_conv_shape") is not None:
            fields["pos_conv_shape"] = PosConvShape.from_dict(fields["pos_conv_shape"])
        if fields.get("position_channels") is not None:
            fields["position_channels"] = tuple(fields["position_channels"])
        if fields.get("output") is not None:
            fields["output"] = HeadsConfig.from_dict(fields["output"])
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> EncoderConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the encoder config is not valid JSON ({error}); it starts with {text[:60]!r}") from error
        return cls.from_dict(values)


def uniform_layers(
    num_layers: int, num_heads: int, head_dim: int, ffn_dim: int, position_bias: bool = False
) -> tuple[LayerConfig, ...]:
    """``num_layers`` equal, unpruned Transformer layers; ``position_bias`` = the encoder has a shared one."""
    heads = tuple(range(num_heads)) if position_bias else None
    return (LayerConfig(num_heads=num_heads, head_dim=head_dim, ffn_dim=ffn_dim, position_heads=heads),) * num_layers


def _layer_from_dict(values: Mapping[str, Any]) -> LayerConfig:
    heads = values.get("position_heads")
    return LayerConfig(**{**values, "position_heads": None if heads is None else tuple(heads)})


def parse_conv_layers(text: str) -> tuple[ConvLayerConfig, ...]:
    """Reads fairseq's ``conv_feature_layers``, a list expression such as ``[(512,10,5)] + [(512,3,2)] * 4``, without `eval`.

    Raises:
        ValueError: anything but sums and integer multiples of lists of three integers.
    """
    import ast

    def walk(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.List):
            return [walk(e) for e in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(walk(e) for e in node.elts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(left, int) and isinstance(right, list):
                left, right = right, left
            if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
                if len(left) * right > MAX_CONV_LAYERS:  # the string comes from a file and could ask for any size
                    raise ValueError(f"more than {MAX_CONV_LAYERS} layers")
                return left * right
        raise ValueError(f"unexpected {ast.unparse(node)!r}")

    try:
        layers = walk(ast.parse(text.strip(), mode="eval"))
        shapes = [[operator.index(size) for size in layer] for layer in layers]
        return tuple(ConvLayerConfig(channels, kernel, stride) for channels, kernel, stride in shapes)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        raise ValueError(
            f"`conv_feature_layers` must be a list of (channels, kernel, stride), such as "
            f"[(512, 10, 5)] + [(512, 3, 2)] * 4, but is {shown!r}: {error}"
        ) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
