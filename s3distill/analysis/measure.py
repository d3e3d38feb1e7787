"""What a checkpoint costs: parameters, MACs and shapes as `inspect` and the report show them, and measured speed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from s3distill import compat
from s3distill.analysis.layer_weights import layer_weights_of
from s3distill.analysis.timing import synchronize, threads
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.config import SAMPLE_RATE
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.pos_shape import pos_conv_outputs
from s3distill.encoder.speech_model import SpeechModel
from s3distill.encoder.variants import describe_variants
from s3distill.gates import GateCounts, breakdown, count_macs_per_second
from s3distill.gates.cost import UTTERANCE_S
from s3distill.masks.compact import bake_compact
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.state import network_of

# prefix of a parameter that is no part of the encoder -> what `describe` counts it under
_EXTRA_PARTS = {".heads.": "prediction_heads", ".gates.": "gates", ".lagrangian.": "gates"}


_SPEED_OF_PATTERN = {
    "unstructured": "storage only: zeros at any place are multiplied like other weights",
    "2:4": "storage here; real on GPUs with sparse tensor cores, in half precision or int8",
    "rows": "real on any machine: closed rows are left out",
    "columns": "real on any machine: closed columns are left out",
}

MIN_TIMING_S = 1.0  # small models run for a millisecond, where a few repeats can all meet other load


@dataclass(frozen=True)
class RTF:
    """Speed of an encoder on one utterance: batch 1, float32.

    Attributes:
        rtf: processing time / audio time; below 1 is faster than real time.
        processing_s: the fastest run, seconds.
        audio_s: length of the audio, seconds.
        num_threads: CPU threads that were used.
    """

    rtf: float
    processing_s: float
    audio_s: float
    num_threads: int


@dataclass(frozen=True)
class Speedup:
    """Two encoders on the same audio; ``speedup`` = teacher's time / student's time."""

    speedup: float
    teacher: RTF
    student: RTF


def measure_rtf(
    model: SpeechModel, seconds: float = UTTERANCE_S, repeats: int = 5, num_threads: int | None = None
) -> RTF:
    """Times the encoder on noise, after one run to warm up; the minimum of its runs, which other load disturbs least.

    Args:
        seconds: length of the audio; attention makes long audio slower per second.
        repeats: runs at least; there are more until `MIN_TIMING_S` has passed.
        num_threads: CPU threads; None keeps torch's setting.
    Raises:
        ValueError: no repeats, no threads, or audio shorter than one frame.
    """
    return _measure([model], seconds, repeats, num_threads)[0]


def measure_speedup(
    teacher: SpeechModel,
    student: SpeechModel,
    seconds: float = UTTERANCE_S,
    repeats: int = 5,
    num_threads: int | None = None,
) -> Speedup:
    """Times two encoders in turn on the same audio, so that a change of the machine's load meets both; see `measure_rtf`."""
    slow, fast = _measure([teacher, student], seconds, repeats, num_threads)
    return Speedup(slow.processing_s / fast.processing_s, slow, fast)


def measure_rtfs(
    models: Sequence[SpeechModel], seconds: float = UTTERANCE_S, repeats: int = 5, num_threads: int | None = None
) -> list[RTF]:
    """Times several encoders in turns on the same audio, as `measure_speedup` does two."""
    return _measure(models, seconds, repeats, num_threads)


def measure_mask_speedup(
    path: str | os.PathLike[str], seconds: float = UTTERANCE_S, repeats: int = 5, num_threads: int | None = None
) -> Speedup | None:
    """What the masks of a checkpoint gain on this machine: closed rows and columns left out, against the dense masked weights.

    None where no mask closes a whole row or column, so that there is nothing to leave out.
    """
    parsed = parse_checkpoint(compat.load_checkpoint(path), str(path))
    dense, compact = (network_of(parsed, str(path)) for _ in range(2))
    dense.bake()
    if bake_compact(compact) == 0:
        return None
    slow, fast = _measure([dense, compact], seconds, repeats, num_threads)
    return Speedup(slow.processing_s / fast.processing_s, slow, fast)


def measure_encoders(
    encoders: list[SpeechEncoder], seconds: float = UTTERANCE_S, repeats: int = 5, num_threads: int | None = None
) -> list[RTF]:
    """Times encoders in turn on the same audio; see `measure_rtf`."""
    return _measure(list(encoders), seconds, repeats, num_threads)


def _measure(
    models: Sequence[SpeechModel | MaskedNetwork | SpeechEncoder], seconds: float, repeats: int, num_threads: int | None
) -> list[RTF]:
    if repeats < 1 or (num_threads is not None and num_threads < 1):
        raise ValueError(f"`repeats` and `num_threads` must be at least 1, but are {repeats} and {num_threads}")
    num_samples = round(seconds * SAMPLE_RATE)
    waveform = 0.1 * torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0))
    best = [float("inf")] * len(models)
    with torch.inference_mode(), threads(num_threads):
        for _ in models:
            for model in models:
                _time_once(model, waveform)
        start, runs = time.perf_counter(), 0
        while runs < repeats or time.perf_counter() - start < MIN_TIMING_S:
            runs += 1
            best = [min(b, _time_once(m, waveform)) for b, m in zip(best, models, strict=True)]
        used = torch.get_num_threads()
    audio_s = num_samples / SAMPLE_RATE
    return [RTF(b / audio_s, b, audio_s, used) for b in best]


def _time_once(model: SpeechModel | MaskedNetwork | SpeechEncoder, waveform: Tensor) -> float:
    device = next(model.parameters()).device
    waveform = waveform.to(device)
    synchronize(device)
    start = time.perf_counter()
    encoder = model.encoder if isinstance(model, SpeechModel) else model
    encoder = encoder.w2v_model if isinstance(encoder, MaskedNetwork) else encoder
    encoder(waveform)
    synchronize(device)
    return time.perf_counter() - start


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything that a checkpoint says about its size, as plain values for JSON.

    Returns:
        ``params`` (total without and with what training added: encoder, ctc_head, prediction_heads, gates, other),
        ``macs_per_second`` of the encoder, their ``breakdown`` by part, ``conv_layers`` and ``layers`` shapes, outputs of each
        positional convolution (``pos_conv``), ``checkpoint_bytes``, what kind of model it is, its ``variants`` in words, and
        ``output``, the prediction heads that stay at inference (None: there are none).
    Raises:
        FileNotFoundError, ValueError: see `s3distill.load`.
    """
    parsed = parse_checkpoint(compat.load_checkpoint(path), str(path))
    config, full = parsed.config, GateCounts.full(parsed.config)
    return {
        "path": str(path),
        "checkpoint_bytes": compat.checkpoint_size(path),
        "model": parsed.model_name,
        "family": parsed.family,
        "normalize": parsed.normalize,
        "num_symbols": None if parsed.head_state is None else int(parsed.head_state["weight"].shape[0]),
        "params": _count_params(parsed),
        "masks": _describe_masks(parsed),
        "macs_per_second": count_macs_per_second(config, full),
        "breakdown": {
            "params": breakdown(config, full, "params"),
            "macs_per_second": breakdown(config, full, "macs"),
        },
        "embed_dim": config.embed_dim,
        "pos_conv": [sum(outputs) for outputs in pos_conv_outputs(config)],
        "extractor_mode": config.extractor_mode,
        "layer_norm_first": config.layer_norm_first,
        "conv_layers": [asdict(layer) for layer in config.conv_layers],
        "layers": [asdict(layer) for layer in config.layers],
        "variants": describe_variants(config),
        "output": _describe_output(parsed),
    }


def _describe_output(parsed: ParsedCheckpoint) -> dict[str, Any] | None:
    """Prediction heads that stay at inference: width, and each teacher layer's share."""
    weights = layer_weights_of(parsed)
    return None if weights is None else {"dim": parsed.config.output_dim, "weights": weights}


def _describe_masks(parsed: ParsedCheckpoint) -> dict[str, Any] | None:
    """Connection masks (S3-Router): what they keep, what they take to store, and what they can save at run time."""
    if not parsed.scores:
        return None
    masked = network_of(parsed).masked_modules()
    masks = {name: module.mask() for name, module in masked.items()}
    connections = sum(mask.numel() for mask in masks.values())
    in_open_lines = sum(int(mask.any(0).sum()) * int(mask.any(1).sum()) for mask in masks.values() if mask.dim() == 2)
    in_linears = sum(mask.numel() for mask in masks.values() if mask.dim() == 2)
    pattern = next(iter(masked.values())).rule.pattern
    return {
        "number": len(masks),
        "pattern": pattern,
        "connections": connections,
        "density": sum(int(mask.sum()) for mask in masks.values()) / connections,
        # one bit per score, once training is over: rows and columns share one
        "mask_bytes": sum((module.scores.numel() + 7) // 8 for module in masked.values()),
        "weight_bytes": 4 * connections,
        # share of the masked Linears' MACs that falls away when closed rows and columns are left out
        "macs_saved": 1 - in_open_lines / in_linears if in_linears else 0.0,
        "speed": _SPEED_OF_PATTERN[pattern],
    }


def _count_params(parsed: ParsedCheckpoint) -> dict[str, int]:
    params = {"encoder": _numel(parsed.encoder_state), "ctc_head": _numel(parsed.head_state or {})}
    params |= {"prediction_heads": 0, "gates": 0, "other": 0}
    for name, tensor in parsed.extra_state.items():
        part = next((p for prefix, p in _EXTRA_PARTS.items() if prefix in f".{name}"), "other")
        params[part] += tensor.numel()
    params["total"] = sum(params.values())
    return params


def _numel(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
