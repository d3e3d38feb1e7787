"""How much a recogniser needs each of its weights: the diagonal of its Fisher information, for elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from s3distill.data.audio import read_audio
from s3distill.data.manifest import label_path, read_labels, validate_for_training
from s3distill.data.manifest_check import label_faults
from s3distill.data.manifest_lines import Manifest
from s3distill.encoder.speech_model import SpeechModel
from s3distill.masks.checksum import backbone_checksum

BLANK = 0  # index of `<s>` in fairseq's dictionaries


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of a recogniser, by the names of its parameters in fairseq's fine-tuned models.

    Attributes:
        values: F, float32, e.g. ``w2v_encoder.w2v_model.encoder.layers.0.fc1.weight`` and ``w2v_encoder.proj.weight``.
        means: theta*, the parameters themselves.
        num_utterances: how many F is the mean over.
        targets: where the transcripts were from: ``labels``, or ``sampled`` from the model.
        symbols: dictionary of the head.
    """

    values: dict[str, Tensor]
    means: dict[str, Tensor]
    num_utterances: int
    targets: str
    symbols: tuple[str, ...]

    def mean(self) -> float:
        """Mean of F over all parameters."""
        total = sum(float(value.double().sum()) for value in self.values.values())
        return total / max(sum(value.numel() for value in self.values.values()), 1)

    def fingerprint(self) -> str:
        """Names the model: SHA-256 over its parameters."""
        return backbone_checksum(self.means)


@dataclass(frozen=True)
class Utterances:
    """Utterances of a manifest, and what was said; checked, not yet read.

    Attributes:
        targets: symbols by index, or None where the model is to say what was said.
    """

    manifest: Manifest
    indices: list[int]
    targets: list[list[int]] | None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for position, index in enumerate(self.indices):
            path = self.manifest.audio_path(index)
            target = None if self.targets is None else torch.tensor(self.targets[position], dtype=torch.long)
            yield str(path), torch.from_numpy(read_audio(path)), target


def find_utterances(
    manifest_path: str | Path,
    model: SpeechModel,
    symbols: Sequence[str],
    labels: str | None = "ltr",
    max_utterances: int | None = None,
) -> Utterances:
    """Reads and checks a manifest with its labels.

    Args:
        labels: label file, as an ending beside the manifest or as a path; None: there are none.
        max_utterances: so many of them, spread evenly over the manifest; None: all.
    Raises:
        ValueError: a fault in either, symbols that the model lacks, or labels that do not fit its frames.
    """
    if max_utterances is not None and max_utterances < 1:
        raise ValueError(f"`max_utterances` must be at least 1, but is {max_utterances}")
    config = model.encoder.config
    manifest = validate_for_training(manifest_path, min_samples=config.receptive_field)
    number = len(manifest.entries)
    take = min(number, max_utterances or number)
    indices = [i * number // take for i in range(take)]
    if labels is None:
        return Utterances(manifest, indices, None)
    path = label_path(manifest_path, labels)
    index_of = {symbol: index for index, symbol in enumerate(symbols)}
    faults = list(label_faults(manifest, path, index_of, config.num_frames))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")
    lines = read_labels(path)
    return Utterances(manifest, indices, [[index_of[symbol] for symbol in lines[i].split()] for i in indices])


def estimate_fisher(
    model: SpeechModel,
    utterances: Iterable[tuple[str, Tensor, Tensor | None]],
    symbols: Sequence[str],
    seed: int = 1,
    progress: bool = False,
) -> Fisher:
    """F_i = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2,  p(y | x) of CTC  (Kirkpatrick et al., 2017, section 2).

    The gradient of each utterance is squared, not that of a batch, in which utterances cancel. Transcripts that the model
    samples itself (a path from its posteriors, repeats and blanks removed, which is exactly y ~ p(y | x)) give the Fisher
    information proper; those of labels give the empirical one (Kunstner et al., 2019). The model is in evaluation mode and
    one utterance is in memory at a time.

    Args:
        utterances: name, waveform [S] at 16 kHz, and symbols [N] by index or None (sampled) of each.
        symbols: dictionary of the head.
        seed: with an utterance's position, of what is sampled.
    Raises:
        ValueError: no utterances, some have a transcript and some not, or a probability is 0.
    """
    names = parameter_names(model)
    parameters = dict(model.named_parameters())
    learned = list(parameters.values())
    sums = {name: torch.zeros_like(parameters[inner]) for inner, name in names.items()}
    kinds = set()
    number = 0
    for name, waveform, given in tqdm(utterances, desc="fisher", unit=" utterances", disable=not progress):
        kinds.add("sampled" if given is None else "labels")
        log_probability = _log_probability(model, waveform, given, [seed, number])
        if not torch.isfinite(log_probability):
            raise ValueError(
                f"the probability of a transcript must be above 0, but that of {name} has the logarithm {log_probability.item()}; are its "
                "labels those of this audio, and has the model converged?"
            )
        gradients = torch.autograd.grad(log_probability, learned, allow_unused=True)
        for inner, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:  # the mask embedding has no part in evaluation mode
                sums[names[inner]].addcmul_(gradient, gradient)
        number += 1
    if len(kinds) != 1:
        raise ValueError(
            f"all utterances must have a transcript, or none, and there must be one at least, but there are {number}"
        )
    return Fisher(
        {name: (total / number).float().cpu() for name, total in sums.items()},
        {names[inner]: p.detach().float().cpu().clone() for inner, p in parameters.items()},
        number,
        kinds.pop(),
        tuple(symbols),
    )


def parameter_names(model: SpeechModel) -> dict[str, str]:
    """Names of a `SpeechModel`'s parameters -> their names in fairseq's fine-tuned models."""
    rooms = {"encoder": "w2v_encoder.w2v_model", "head": "w2v_encoder.proj"}
    names = [name.partition(".") for name, _ in model.named_parameters()]
    return {f"{room}.{rest}": f"{rooms[room]}.{rest}" for room, _, rest in names}


def combine_fishers(parts: Sequence[Fisher], sources: Sequence[str]) -> Fisher:
    """The Fisher information over all utterances of the parts, sum_k N_k F_k / sum_k N_k, of one model.

    Args:
        sources: what messages call the parts.
    Raises:
        ValueError: they are not of one model, or differ in their kind of transcripts.
    """
    first = parts[0]
    for part, source in zip(parts[1:], sources[1:], strict=True):
        if part.fingerprint() != first.fingerprint():
            raise ValueError(
                f"what is combined must be of one model, but {source} is of another than {sources[0]}; to hold what two models learned, "
                "pass both files to criterion.ewc_paths"
            )
        if part.targets != first.targets:
            raise ValueError(
                f"what is combined must be of one kind of transcripts, but {source} is of {part.targets}, {sources[0]} of {first.targets}"
            )
    number = sum(part.num_utterances for part in parts)
    values = {
        name: sum((part.num_utterances * part.values[name].double() for part in parts), torch.zeros(())).float()
        / number
        for name in first.values
    }
    return Fisher(values, first.means, number, first.targets, first.symbols)


def _log_probability(model: SpeechModel, waveform: Tensor, given: Tensor | None, seed: list[int]) -> Tensor:
    """log p(y | x) of one utterance, []."""
    parameter = next(model.parameters())
    logits = model(waveform[None].to(parameter)).logits
    assert logits is not None and not model.pooled, "a recogniser has a head for each frame"
    log_probs = logits.log_softmax(-1).transpose(0, 1)  # [T, 1, V]
    target = _sample(log_probs[:, 0].detach(), seed) if given is None else given
    lengths = torch.tensor([len(log_probs)]), torch.tensor([len(target)])
    with torch.backends.cudnn.flags(enabled=False):  # its CTC refuses what others take, such as long targets
        return -F.ctc_loss(log_probs, target[None].to(logits.device), *lengths, BLANK, reduction="sum")


def _sample(log_probs: Tensor, seed: list[int]) -> Tensor:
    """A transcript y ~ p(y | x) of CTC from posteriors [T, V]: one symbol per frame, without repeats, then without blanks."""
    cumulative = log_probs.double().exp().cumsum(-1).cpu()
    draws = torch.from_numpy(np.random.default_rng(seed).random((len(cumulative), 1)))
    path = torch.searchsorted(cumulative / cumulative[:, -1:], draws, right=True)[:, 0]
    path = path.clamp_max(log_probs.shape[-1] - 1).unique_consecutive()
    return path[path != BLANK]
