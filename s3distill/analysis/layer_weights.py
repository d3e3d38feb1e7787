"""Which of the teacher's layers fine-tuned models read: the weights of their kept prediction heads, as figures and as a page."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from s3distill import compat
from s3distill.analysis.plots import INK, PALETTE, new_figure, to_svg
from s3distill.analysis.report import STYLE, captioned
from s3distill.data.manifest import write_lines
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint

LayerWeights = Mapping[int, float]  # teacher layer -> its share of the output; they add up to 1


def layer_weights_of(parsed: ParsedCheckpoint) -> dict[int, float] | None:
    """Share of each kept head's prediction in the encoder's output, by teacher layer; None for an encoder without kept heads."""
    output = parsed.config.output
    if output is None:
        return None
    layers = [teacher for _, teacher in output.pairs]
    logits = parsed.encoder_state.get("output_heads.layer_weights", torch.zeros(len(layers)))
    return dict(zip(layers, logits.double().softmax(0).tolist(), strict=True))


def read_layer_weights(path: str | os.PathLike[str]) -> dict[int, float]:
    """`layer_weights_of` a checkpoint.

    Raises:
        ValueError: it keeps no heads, or a single one, which has no weight.
    """
    weights = layer_weights_of(parse_checkpoint(compat.load_checkpoint(path), str(path)))
    if weights is None or len(weights) == 1:
        kept = "none" if weights is None else "one"
        raise ValueError(
            f"{path} must keep several prediction heads, whose weights are shown, but keeps {kept}; make such a student with s3distill "
            "keep-heads --layers all, and fine-tune it"
        )
    return weights


def plot_layer_weights(weights: Mapping[str, LayerWeights]) -> str:
    """Lines over the teacher's layers, one per model; where a layer is not predicted its line has no point.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = new_figure((7.2, 3.0))
    for i, (name, shares) in enumerate(weights.items()):
        layers = sorted(shares)
        axes.plot(layers, [shares[layer] for layer in layers], "o-", color=PALETTE[i % len(PALETTE)], label=name)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({layer for shares in weights.values() for layer in shares}))
    axes.set_xlabel("layer of the teacher")
    axes.set_ylabel("weight")
    if len(weights) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    words = [f"{name}: layer {max(s, key=s.__getitem__)} most, {max(s.values()):.3f}" for name, s in weights.items()]
    return to_svg(figure, f"Weights of the teacher's layers. {'; '.join(words)}.")


def write_layer_weights(path: str | os.PathLike[str], weights: Mapping[str, LayerWeights]) -> None:
    """Writes the plot and a table of its figures as one HTML page."""
    title = "Which of the teacher's layers are read"
    layers = sorted({layer for shares in weights.values() for layer in shares})
    head = "".join(f'<th scope="col">{text}</th>' for text in ("", *layers))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{shares[layer]:.3f}</td>" if layer in shares else "<td>-</td>" for layer in layers)
        + "</tr>"
        for name, shares in weights.items()
    )
    caption = "Softmax weights of the kept prediction heads: each share of the output, by the teacher's layer that the head predicts."
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            captioned(plot_layer_weights(weights), caption),
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
        ]
    )
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    write_lines(Path(path), [f'<!doctype html>\n<html lang="en"><head>{meta}</head><body>\n{body}\n</body></html>'])
