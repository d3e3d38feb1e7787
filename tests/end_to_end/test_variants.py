"""Students of other architectures from scratch through the real commands: distil, prune, fine-tune, inspect, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import s3distill
from s3distill import compat
from s3distill.data.manifest import read_manifest
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import stock_options
from s3distill.gates import GateCounts, count_parameters

SCRATCH = (
    "model.student_path=null",
    *("++model.encoder_layers=4", "++model.encoder_embed_dim=16", "++model.encoder_ffn_embed_dim=24"),
    *("++model.encoder_attention_heads=4", "++model.conv_pos=8", "++model.conv_pos_groups=2"),
    "++model.conv_feature_layers='[(12, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2'",
    "model.gate_init_drop=0.4",
    "criterion.target_sparsity=0.9",
)
ALL_UNITS = "model.prune_units=[conv,head,ffn,attention_layer,ffn_layer]"
STUDENTS = {
    "ALBERT, windowed, separable": (
        *("++model.shared=all", "++model.shared_group=2", "++model.separable_conv_layers=[1,2,3,4,5,6]"),
        *("++model.attention=windowed", "++model.attention_window=4", "++model.attention_global=1"),
    ),
    "maps and FFNs in common": ("++model.shared=ffn", "++model.reuse_attention_layers=[1,3]"),
    "Linformer, shared attention": (
        *("++model.shared=attention", "++model.attention=linformer"),
        *("++model.linformer_dim=8", "++model.linformer_max_frames=100"),
    ),
}
SHAPES = {
    "ALBERT, windowed, separable": [
        *("groups of 2 layers share all parameters", "stride 2   separable"),
        "attention to 4 frames on each side, and to and from the first 1",
    ],
    "maps and FFNs in common": ["all layers share their FFN", "reuses the attention map before it"],
    "Linformer, shared attention": [
        "all layers share their attention",
        "Linformer's attention: 100 frames at most become 8",
    ],
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_from_scratch_goes_all_the_way(kit: Any, tmp_path: Path, name: str) -> None:
    out, compact, folder = tmp_path / "stage1", tmp_path / "compact.pt", tmp_path / "folder"
    kit.stage1(out, *SCRATCH, *STUDENTS[name], ALL_UNITS, max_update=3).succeeded()
    checkpoint = kit.last_checkpoint(out)
    trained = parse_checkpoint(compat.load_checkpoint(checkpoint))  # its config alone says the shape
    counted = count_parameters(trained.config, GateCounts.full(trained.config))
    assert counted == sum(value.numel() for value in trained.encoder_state.values())
    kit.commands.run("s3distill", "prune", checkpoint, compact).succeeded()
    pruned = parse_checkpoint(compat.load_checkpoint(compact))
    assert 0 < sum(value.numel() for value in pruned.encoder_state.values()) < counted
    waveforms = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = s3distill.load(checkpoint)(waveforms).x
        got = s3distill.load(compact)(waveforms).x
        assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        kit.commands.run("s3distill", "convert", compact, folder).succeeded()
        assert torch.equal(s3distill.load(folder)(waveforms).x, got)
        kit.commands.run("s3distill", "convert", folder, tmp_path / "back.pt").succeeded()
        assert torch.equal(s3distill.load(tmp_path / "back.pt")(waveforms).x, got)
    shown = kit.commands.run("s3distill", "inspect", checkpoint, "--no-rtf").succeeded().output
    assert all(line in shown for line in SHAPES[name]), shown
    tuned = finetune(kit, compact, kit.corpus, tmp_path / "tuned").succeeded()
    assert "done training" in tuned.output
    assert s3distill.load(kit.last_checkpoint(tmp_path / "tuned"))(waveforms).logits is not None


def finetune(kit: Any, student: Path, data: Path, out: Path) -> Any:
    return kit.commands.run(
        *("fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"),
        *("common.user_dir=s3distill", f"hydra.run.dir={out}", f"task.data={data}", f"model.w2v_path={student}"),
        *("optimization.max_update=2", "dataset.validate_after_updates=0"),
    )


def write_student(path: Path, teacher: Path, **changes: Any) -> Path:
    config = parse_checkpoint(compat.load_checkpoint(teacher)).config
    config = EncoderConfig.from_dict({**config.to_dict(), **changes})
    torch.manual_seed(0)
    options = stock_options(config, "ssl_student", True)
    compat.write_checkpoint(
        path, SpeechEncoder(config).state_dict(), options, {"_name": "audio_pretraining", "normalize": True}
    )
    return path


def test_labels_must_fit_the_reduced_frames(kit: Any, tmp_path: Path) -> None:
    """Lines that 50 frames per second hold, and 25 do not: refused in front of training, by line; decoding takes them."""
    data = kit.write_corpus(tmp_path / "data")
    manifest = read_manifest(data / "train.tsv")
    num_labels = [samples // 320 * 3 // 4 for _, samples in manifest.entries]
    (data / "train.ltr").write_text("".join(" ".join("AB"[i % 2] for i in range(n)) + "\n" for n in num_labels))
    (data / "train.wrd").unlink()
    full = finetune(kit, write_student(tmp_path / "full.pt", kit.teacher), data, tmp_path / "full")
    assert "done training" in full.succeeded().output
    half = finetune(kit, write_student(tmp_path / "half.pt", kit.teacher, time_reduction=2), data, tmp_path / "half")
    assert half.status != 0 and "begin training epoch" not in half.output
    samples = manifest.entries[0][1]
    frames = ((samples - 400) // 320 + 1) // 2
    expected = f"train.ltr:1: CTC needs a frame for each of {num_labels[0]} labels and 0 repeated ones"
    assert expected in half.output and f"there are {frames}" in half.output, half.output[-1500:]
    assert "`s3distill check" in half.output and "train.tsv --model STUDENT.pt` lists all" in half.output
    check = ("s3distill", "check", data / "train.tsv", "--no-progress")
    assert kit.commands.run(*check).status == 0  # 50 frames per second are enough
    listed = kit.commands.run(*check, "--model", tmp_path / "half.pt")
    assert listed.status == 1 and listed.output.count("CTC needs a frame") == len(num_labels)
    fits = finetune(kit, tmp_path / "half.pt", kit.corpus, tmp_path / "fits").succeeded()
    assert "done training" in fits.output


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            (
                *(*SCRATCH, "++model.time_reduction=2", "model.distill_layers=''", "criterion.l1_weight=0"),
                *("criterion.cosine_weight=0", "criterion.temporal_layer_weight=1", "criterion.temporal_layers='1'"),
            ),
            ["model.time_reduction=2", "per 640 samples", "teacher.pt has one per 320"],
        ),
        (
            ("++model.shared=all", "++model.time_reduction=2"),
            ["`model.time_reduction` shapes students from scratch", "model.shared", "model.student_path"],
        ),
        ((*SCRATCH, "++model.separable_conv_layers=[0]"), ["conv layer 0 cannot be `separable`"]),
        ((*SCRATCH, "++model.reuse_attention_layers=[4]"), ["`reuse_attention_layers`", "0 to 3", "[4]"]),
        ((*SCRATCH, "++model.attention=windowed"), ["`attention_window` must be at least 1"]),
        (
            (*SCRATCH, "++model.attention=linformer", "++model.linformer_dim=4", "++model.linformer_max_frames=5"),
            ["`linformer_max_frames` = 5 frames", "task.max_sample_size"],
        ),
    ],
)
def test_errors(kit: Any, tmp_path: Path, options: tuple[str, ...], parts: list[str]) -> None:
    command = kit.stage1(tmp_path / "out", *options, "model.prune_units=[]", "criterion.target_sparsity=0")
    assert command.status != 0
    assert all(part in command.output for part in parts), command.output[-2000:]


def test_inspect_compares_variants(kit: Any, tmp_path: Path) -> None:
    """A part that only one of two models has stands beside a 0 of the other."""
    student = write_student(tmp_path / "half.pt", kit.teacher, time_reduction=2)
    for first, other in ((student, kit.teacher), (kit.teacher, student)):
        output = kit.commands.run("s3distill", "inspect", first, "--compare", other, "--no-rtf").succeeded().output
        assert "  time_reduction" in output
        assert ("time reduction: 2 frames become one, every 640 samples" in output) == (first == student)
    alone = kit.commands.run("s3distill", "inspect", kit.teacher, "--no-rtf", "--json").succeeded().output
    report = json.loads(alone[alone.index("{") :])
    assert report["variants"] == [] and not report["layers"][0]["reuses_attention"]
