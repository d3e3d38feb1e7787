"""The table of `labels.sh`: accuracies of masks, full fine-tuning and heads alone, and the bytes that a task adds.

Runs are read with `s3distill.load`, which needs no fairseq: an example of how a classifier is used.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

import s3distill
from s3distill import compat
from s3distill.data.audio import read_audio
from s3distill.data.manifest import read_manifest
from s3distill.data.utterance_labels import read_utterance_labels
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.pack import trained_tensors
from s3distill.masks.state import read_masks

KINDS = {"mask": "mask", "full": "all weights", "head": "head alone"}
BATCH_SIZE = 16  # utterances


@torch.inference_mode()
def classify(checkpoint: Path, manifest_path: Path) -> list[str]:
    """The class that a model gives to every utterance of a manifest."""
    model, manifest = s3distill.load(checkpoint), read_manifest(manifest_path)
    if not model.pooled or model.symbols is None:
        raise ValueError(f"{checkpoint} must be a run of wav2vec_label_st; it has no head for utterances")
    found: list[str] = []
    for start in range(0, len(manifest.entries), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(manifest.entries)))
        waveforms = [torch.from_numpy(read_audio(manifest.audio_path(row))) for row in rows]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        logits = model(torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths).logits  # [B, V]
        found += [model.symbols[best] for best in logits.argmax(-1).tolist()]
    return found


def accuracy(found: list[str], labels: list[str]) -> float:
    """Per cent."""
    return 100 * sum(a == b for a, b in zip(found, labels, strict=True)) / len(labels)


def added_bytes(checkpoint: Path, backbone: Path) -> int:
    """What has to be stored beside the backbone: bits of masks, and everything that differs from it."""
    run, base = (parse_checkpoint(compat.load_checkpoint(path), str(path)) for path in (checkpoint, backbone))
    masks = read_masks(run, str(checkpoint))
    _, trained = trained_tensors(run, base, masks, str(checkpoint), str(backbone))
    num_bits = sum(mask.numel() for mask in masks.values())
    return num_bits // 8 + sum(value.numel() * value.element_size() for value in trained.values())


def table(out: Path, data: Path, split: str, tasks: list[str]) -> list[str]:
    """Markdown lines."""
    manifest_path = data / f"{split}.tsv"
    heads = [f"{title} %" for title in KINDS.values()] + [f"MB, {title}" for title in KINDS.values()]
    lines = [f"| labels | classes | {split} | most frequent % | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    for task in tasks:
        labels = read_utterance_labels(manifest_path.with_suffix(f".{task}"), read_manifest(manifest_path))
        runs = [out / f"{kind}_{task}" / "checkpoints" / "checkpoint_last.pt" for kind in KINDS]
        scores = [accuracy(classify(run, manifest_path), labels) for run in runs]
        backbone = compat.load_checkpoint(runs[0])["cfg"]["model"]["w2v_path"]
        sizes = [added_bytes(run, Path(backbone)) / 1e6 for run in runs]
        ((_, most),) = Counter(labels).most_common(1)
        cells = [task, str(len(set(labels))), str(len(labels)), f"{100 * most / len(labels):.1f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{s:.1f}' for s in scores), *(f'{s:.3f}' for s in sizes)])} |")
    return lines


def main() -> None:
    out, data, split, *tasks = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    lines = table(out, data, split, tasks)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
