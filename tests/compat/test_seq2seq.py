"""Stock models with a decoder: any width, and checkpoints that rebuild without the file of ``w2v_path``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils

from tests.encoder import checkpoints
from tests.masks.students import write_compact_student
from tests.models import seq2seq


def write_backbone(path: Path, family: str) -> Path:
    if family == "compact":
        write_compact_student(path)
        state = torch.load(path, weights_only=True)
        state["cfg"]["task"] |= {"_name": "audio_distill", "data": ""}  # as a training leaves them
        return checkpoints.save(state, path)
    state, _ = checkpoints.pretrained(family, {**checkpoints.SMALL, **seq2seq.SHAPE}, normalize=False)
    if family == "hubert":
        state["cfg"]["task"]["labels"] = ["ltr"]  # whose dictionary stock HuBERT looks for
    return checkpoints.save(state, path)


@pytest.mark.parametrize(
    ("name", "family"), [("wav2vec_seq2seq", "wav2vec2"), ("wav2vec_seq2seq", "compact"), ("hubert_seq2seq", "hubert")]
)
def test_a_stock_decoder_of_any_width_rebuilds_alone(tmp_path: Path, name: str, family: str) -> None:
    data = seq2seq.write_corpus(tmp_path / "corpus")
    backbone = write_backbone(tmp_path / "pretrained.pt", family)
    for width in (16, 32):  # another one than the encoder's 32, and the same
        task, model, cfg = seq2seq.build(data, backbone, name, decoder_embed_dim=width)
        with torch.no_grad():
            expected = model.eval()(**seq2seq.batch(task)["net_input"])[0]
        path = seq2seq.save(tmp_path / f"{width}.pt", task, model, cfg)
        backbone.rename(tmp_path / "away.pt")
        (rebuilt,), _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
        (tmp_path / "away.pt").rename(backbone)
        with torch.no_grad():
            found = rebuilt.eval()(**seq2seq.batch(task)["net_input"])[0]
        assert torch.equal(found, expected) and found.shape[-1] == len(task.target_dictionary)
