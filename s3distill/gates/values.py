"""What the encoder consumes of the gates: one value per prunable structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3distill.encoder.config import EncoderConfig


@dataclass(frozen=True)
class GateValues:
    """Gate values in [0, 1], float32; None = ungated, that is 1.

    Attributes:
        conv: per conv layer, [C].
        heads: per Transformer layer, [H].
        ffn: per Transformer layer, [F].
        attention_layers: per Transformer layer, the whole attention sub-layer, [].
        ffn_layers: per Transformer layer, the whole FFN sub-layer, [].
        width: the channels of the residual stream, [C].
        pos_conv: per conv of the positional stack, its outputs.
    """

    conv: tuple[Tensor | None, ...]
    heads: tuple[Tensor | None, ...]
    ffn: tuple[Tensor | None, ...]
    attention_layers: tuple[Tensor | None, ...]
    ffn_layers: tuple[Tensor | None, ...]
    width: Tensor | None = None
    pos_conv: tuple[Tensor | None, ...] = ()

    @classmethod
    def open(cls, config: EncoderConfig) -> GateValues:
        """Every gate of an encoder of this shape fully open."""
        none = (None,) * config.num_layers
        return cls((None,) * len(config.conv_layers), none, none, none, none, None, (None,) * config.pos_conv_depth)

    def layer(self, index: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gates of one Transformer layer: heads [H], FFN dims [F], attention sub-layer [], FFN sub-layer []."""
        return self.heads[index], self.ffn[index], self.attention_layers[index], self.ffn_layers[index]

    def positional(self, written: Tensor | None) -> tuple[Tensor | None, ...] | None:
        """What the positional convolution multiplies with, per conv, or None; what the last one writes is the stream's too.

        Args:
            written: channel of the stream per output of the last conv, int64; None = all, in their order.
        """
        if self.width is None:
            return self.pos_conv or None
        assert self.pos_conv, "gates on the width need `pos_conv`: gates or None per convolution"
        stream = self.width if written is None else self.width[written]
        last = self.pos_conv[-1]
        return (*self.pos_conv[:-1], stream if last is None else last * stream)
