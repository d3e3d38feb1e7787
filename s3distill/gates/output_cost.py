"""What prediction heads cost that stay at inference; nothing of them is ever pruned."""

from __future__ import annotations

from s3distill.heads.layer_heads import HeadsConfig


def output_macs(config: HeadsConfig) -> int:
    """Multiply-accumulates per frame: N d D, and N d^2 for the first Linears of `predlayer` heads, of N heads from width d to D."""
    dim, num_heads = config.student_dim, len(config.pairs)
    hidden = dim * dim if config.mode == "predlayer" else 0
    return num_heads * (hidden + dim * config.teacher_dim)


def output_parameters(config: HeadsConfig) -> int:
    """Parameters of `KeptHeads`: its Linears with their biases, and one weight per head where there are several."""
    num_heads = len(config.pairs)
    hidden = config.student_dim if config.mode == "predlayer" else 0
    biases = num_heads * (hidden + config.teacher_dim)
    return output_macs(config) + biases + (num_heads if num_heads > 1 else 0)
