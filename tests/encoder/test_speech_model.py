"""`s3distill.load` of masked runs: what fairseq's model computes, at the cost of a dense one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.state import baked
from tests.models import labels

ALL_MODULES = {
    **{"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False},
    **{"no_prune_post_extract_proj": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dict.ltr.txt").write_text("| 1\nA 1\nB 1\nC 1\n")
    return folder


def write_ctc_run(
    folder: Path, data: Path, family: str = "wav2vec2", normalize: bool = False, **options: object
) -> tuple:
    backbone = labels.write_backbone(folder / "backbone.pt", family, normalize, layer_norm_first=family == "hubert")
    task, model, cfg = labels.build(data, backbone, normalize=normalize, name="wav2vec_ctc_st", **options)
    labels.scramble(model).eval()
    return labels.write_run(folder / "run.pt", task, model, cfg), model, task


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "normalize", "options"),
    [
        ("wav2vec2", True, {"prune_rate": 0.6}),
        ("wav2vec2", False, {"prune_rate": 0.6, **ALL_MODULES}),
        ("hubert", True, {"prune_rate": 0.9, "fix_attn": True, **ALL_MODULES}),
        ("data2vec_audio", False, {"prune_rate": 0.6, **ALL_MODULES}),
        ("wav2vec2", False, {"prune_rate": 0.5, "mask_pattern": "2:4", "no_prune_post_extract_proj": True}),
        ("wav2vec2", False, {"prune_rate": 0.5, "linear_st_op": "linear_st_outstr"}),
    ],
)
def test_a_masked_ctc_run_gives_the_logits_of_fairseqs_model(
    family: str, normalize: bool, options: dict, data: Path, tmp_path: Path
) -> None:
    path, model, task = write_ctc_run(tmp_path, data, family, normalize, **options)
    lengths = [6000, 2500]
    padding_mask = torch.arange(6000) >= torch.tensor(lengths)[:, None]
    waveforms = 3 * labels.noise(2, 6000) + 0.1
    source = waveforms.masked_fill(padding_mask, 0)
    if normalize:
        for i, length in enumerate(lengths):
            source[i, :length] = torch.nn.functional.layer_norm(source[i, :length], (length,))
    expected = model(source=source, padding_mask=padding_mask)["encoder_out"].transpose(0, 1)  # [B, T, V]

    loaded = s3distill.load(path)
    out = loaded(waveforms, torch.tensor(lengths))
    assert not loaded.pooled and loaded.symbols == task.target_dictionary.symbols
    for i, length in enumerate(lengths):
        frames = loaded.encoder.config.num_frames(length)
        torch.testing.assert_close(out.logits[i, :frames], expected[i, :frames], rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1
    assert not any(name.endswith(".scores") for name, _ in loaded.named_parameters())
    closed = (loaded.encoder.get_parameter("encoder.layers.0.fc1.weight") == 0).float().mean().item()
    assert closed == pytest.approx(1 - options["prune_rate"], abs=0.02)


@torch.no_grad()
def test_the_masks_are_heard(data: Path, tmp_path: Path) -> None:
    path, _, _ = write_ctc_run(tmp_path, data, prune_rate=0.6)
    state = torch.load(path, weights_only=False)
    state["model"] = {name: value for name, value in state["model"].items() if not name.endswith(".scores")}
    torch.save(state, tmp_path / "unmasked.pt")
    source = labels.noise(1, 5000)
    masked, unmasked = (s3distill.load(p)(source).logits for p in (path, tmp_path / "unmasked.pt"))
    assert (masked - unmasked).abs().max() > 0.1


def test_a_checkpoint_without_masks_is_left_as_it_is(tmp_path: Path) -> None:
    parsed = parse_checkpoint(compat.load_checkpoint(labels.write_backbone(tmp_path / "dense.pt")))
    assert baked(parsed) is parsed


def test_masks_that_do_not_fit_their_options_are_named(data: Path, tmp_path: Path) -> None:
    path, _, _ = write_ctc_run(tmp_path, data, prune_rate=0.6)
    state = torch.load(path, weights_only=False)
    del state["model"]["w2v_encoder.w2v_model.encoder.layers.1.fc1.scores"]
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"the masks of .*run\.pt cannot be read: the checkpoint must have scores for every"
    ):
        s3distill.load(path)


def test_a_masked_run_is_no_backbone(data: Path, tmp_path: Path) -> None:
    path, _, _ = write_ctc_run(tmp_path, data, prune_rate=0.6)
    with pytest.raises(
        ValueError, match=r"run\.pt has masks beside its weights, which would be lost.*s3distill masks bake"
    ):
        labels.build(data, path, normalize=False, name="wav2vec_ctc_st")
