"""Train, pack, decode: the real commands, in every precision that a run can have. The bank's text is the run's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.masks.bank import MaskBank

PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": ("common.bf16=true",),
    # gradients of float16 that are not flattened and not scaled: what runs on a CPU, too
    "float16": ("common.fp16=true", "common.fp16_no_flatten_grads=true", "common.fp16_init_scale=1"),
}


def train(kit: Any, out: Path, *overrides: str) -> Path:
    """Three updates of S3-Router's recipe, masks on all linears; the checkpoint."""
    options = {
        "hydra.run.dir": str(out),
        "task.data": str(kit.corpus),
        "task.normalize": "true",
        "model.w2v_path": str(kit.teacher),
        "dataset.train_subset": "train",
        "dataset.valid_subset": "valid",
        "common.user_dir": "s3distill",
        "common.fp16": "false",
        "distributed_training.distributed_world_size": "1",
        "model._name": "wav2vec_ctc_st",
        "model.trainable_proj": "true",
        "model.prune_rate": "0.5",
        "model.init_score": "weight_rank",
        "model.apply_mask": "false",
        "optimization.max_update": "3",
        "optimization.lr": "[0.0001]",
        "dataset.num_workers": "0",
        "dataset.max_tokens": "60000",
    }
    options |= dict(override.split("=", 1) for override in overrides)
    recipe = ("--config-dir", "examples/wav2vec/config/finetuning", "--config-name", "base_1h")
    kit.commands.run("fairseq-hydra-train", *(f"{key}={value}" for key, value in options.items()), *recipe).succeeded()
    return kit.last_checkpoint(out)


def decode(kit: Any, results: Path, path: Path, *more: object) -> dict[int, str]:
    """fairseq-generate's transcript of each utterance."""
    data = (
        "--task",
        "audio_ctc",
        "--labels",
        "ltr",
        "--gen-subset",
        "valid",
        "--batch-size",
        "2",
        "--num-workers",
        "0",
    )
    # fairseq's own scorer, BLEU in C++, does not return from transcripts as short as these
    where = ("--user-dir", "s3distill", "--path", path, "--cpu", "--results-path", results, "--scoring", "s3_wer")
    kit.commands.run("fairseq-generate", kit.corpus, *data, *where, *more).succeeded()
    text = (results / "generate-valid.txt").read_text()
    return {int(i): found for i, found in re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", text, flags=re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_is_packed_and_decodes_from_the_bank(precision: str, kit: Any, tmp_path: Path) -> None:
    run = train(kit, tmp_path / "out", *PRECISIONS[precision])
    weights = torch.load(run, weights_only=False)["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}, "which says nothing about the run"
    bank_path = tmp_path / "bank.safetensors"
    kit.commands.run("s3distill", "masks", "pack", run, "--name", "nl", "--bank", bank_path).succeeded()
    kit.commands.run("s3distill", "masks", "verify", bank_path, "--backbone", kit.teacher).succeeded()

    bank = MaskBank.open(bank_path)
    assert bank.info("nl")["weights_dtype"] == precision
    assert len(bank.module_names("nl")) == 3 * 6
    assert (
        {"proj.weight", "proj.bias"}
        <= set(bank.tensor_names("nl"))
        <= {
            "proj.weight",
            "proj.bias",
            "w2v_model.mask_emb",
        }
    )
    assert bank.tensor("nl", "proj.weight").dtype == getattr(torch, precision)

    expected = decode(kit, tmp_path / "run", run)
    assert len(expected) == 4 and any(expected.values()), "transcripts that are all empty would prove nothing"
    assert decode(kit, tmp_path / "bank", kit.teacher, "--mask-bank", bank_path, "--mask-name", "nl") == expected
