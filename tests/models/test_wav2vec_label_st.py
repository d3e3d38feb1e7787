"""`wav2vec_label_st`: pooling, what is masked and what learns, and that a run loads everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils, tasks

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from tests.models import labels

FULL = {"prune_rate": 1.0, "co_train": True}
# the same in more words
FULL_IN_WORDS = {
    **{"co_train": True, "fix_attn": True, "fix_fc": True, "no_prune_proj": True, "no_prune_extractor": True},
    **{"no_prune_pos": True, "no_prune_post_extract_proj": True},
}
MASKED = {"prune_rate": 0.7, "trainable_proj": True, "init_score": "weight_rank"}
EVERYTHING_MASKED = {"prune_rate": 0.7, "no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_corpus(tmp_path_factory.mktemp("corpus"), num_train=6, num_valid=3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_backbone(tmp_path_factory.mktemp("backbone") / "backbone.pt")


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Waveforms [B, S], 0 behind their lengths, and the padding mask."""
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return labels.noise(len(lengths), max(lengths)).masked_fill(padding_mask, 0), padding_mask


def logits_of(model: Any, source: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    return model.get_logits(model(source=source, padding_mask=padding_mask))


@torch.no_grad()
def test_logits_are_the_head_of_the_mean_over_valid_frames(corpus: Path, backbone: Path) -> None:
    _, model, _ = labels.build(corpus, backbone, **MASKED)
    labels.scramble(model).eval()
    lengths = [6000, 2500, 4001]
    source, padding_mask = padded(lengths)
    together = logits_of(model, source, padding_mask)
    assert together.shape == (3, len(labels.CLASSES))
    network = model.w2v_encoder
    for i, length in enumerate(lengths):
        frames = network.w2v_model(source[i : i + 1, :length], None).x[0]  # [T, C]
        mean = sum(frame for frame in frames) / len(frames)
        expected = network.proj.weight @ mean + network.proj.bias
        torch.testing.assert_close(together[i], expected, rtol=1e-5, atol=1e-5)
    probabilities = model.get_normalized_probs(model(source=source, padding_mask=padding_mask), log_probs=False)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))
    logarithms = model.get_normalized_probs(model(source=source, padding_mask=padding_mask), log_probs=True)
    torch.testing.assert_close(logarithms.exp(), probabilities)


def test_scores_learn_and_the_weights_stay(corpus: Path, backbone: Path) -> None:
    _, model, _ = labels.build(corpus, backbone, **MASKED)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    masked = [f"w2v_encoder.{name}" for name in model.w2v_encoder.masked_modules()]
    head = {"w2v_encoder.proj.weight", "w2v_encoder.proj.bias"}
    assert len(masked) == 2 * 6 + 1
    assert learning == {f"{name}.scores" for name in masked} | head | {"w2v_encoder.w2v_model.mask_emb"}
    source, padding_mask = padded([6000, 4000])
    torch.nn.functional.cross_entropy(logits_of(model, source, padding_mask), torch.tensor([0, 2])).backward()
    for name in ("w2v_encoder.w2v_model.encoder.layers.0.fc1.scores", "w2v_encoder.proj.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_mask_changes_the_logits(corpus: Path, backbone: Path) -> None:
    _, model, _ = labels.build(corpus, backbone, **MASKED)
    model.eval()
    source = labels.noise(1, 4000)
    before = logits_of(model, source)
    scores = model.w2v_encoder.masked_modules()["w2v_model.encoder.layers.1.fc2"].scores
    scores.copy_(1 / scores)  # others are the smallest now
    assert (logits_of(model, source) - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [FULL, FULL_IN_WORDS], ids=["prune_rate=1", "in words"])
def test_dense_fine_tuning_masks_nothing_and_everything_learns(options: dict, corpus: Path, backbone: Path) -> None:
    _, model, _ = labels.build(corpus, backbone, **options)
    assert not model.w2v_encoder.masked_modules()
    assert all(p.requires_grad for p in model.parameters())
    source, padding_mask = padded([6000, 4000])
    torch.nn.functional.cross_entropy(logits_of(model, source, padding_mask), torch.tensor([0, 2])).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    still = {name for name, _ in model.named_parameters()} - moved
    # without SpecAugment mask_emb is not used; feature_grad_mult is 0, as in fairseq's recipes
    assert all("feature_extractor" in name or name.endswith("mask_emb") for name in still), still
    assert "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight" in moved


@torch.no_grad()
@pytest.mark.parametrize("options", [MASKED, EVERYTHING_MASKED, FULL], ids=["masked", "all masked", "dense"])
def test_a_run_loads_alone_in_fairseq_and_here(options: dict, corpus: Path, backbone: Path, tmp_path: Path) -> None:
    own = labels.write_backbone(tmp_path / "gone.pt")
    task, model, cfg = labels.build(corpus, own, **options)
    labels.scramble(model).eval()
    run = labels.write_run(tmp_path / "run.pt", task, model, cfg)
    own.unlink()
    source, padding_mask = padded([6000, 2500])
    source = torch.stack([*map(normalized, source, [6000, 2500])])
    expected = logits_of(model, source, padding_mask)

    (rebuilt,), _, again = checkpoint_utils.load_model_ensemble_and_task([str(run)])
    assert type(rebuilt).__name__ == "Wav2VecLabelSt" and again.classes == labels.CLASSES
    torch.testing.assert_close(logits_of(rebuilt.eval(), source, padding_mask), expected, rtol=0, atol=1e-6)
    rebuilt.prepare_for_inference_(OmegaConf.create({"generation": {}}))
    assert not rebuilt.w2v_encoder.masked_modules()
    torch.testing.assert_close(logits_of(rebuilt, source, padding_mask), expected, rtol=0, atol=1e-5)

    loaded = s3distill.load(run)
    assert loaded.pooled and loaded.symbols == labels.CLASSES and loaded.normalize
    out = loaded(source, torch.tensor([6000, 2500]))
    assert out.logits.shape == (2, 3) and out.x.dim() == 3
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    assert not any(name.endswith(".scores") for name, _ in loaded.named_parameters())
    parsed = parse_checkpoint(compat.load_checkpoint(run))
    assert parsed.pooled and bool(parsed.scores) == (options is not FULL)


def normalized(waveform: Tensor, length: int) -> Tensor:
    valid = torch.nn.functional.layer_norm(waveform[:length], (length,))
    return torch.cat([valid, torch.zeros(len(waveform) - length)])


def test_keys_are_those_of_the_ctc_model(corpus: Path, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "dict.ltr.txt").write_text("A 1\nB 1\n")
    _, classifier, _ = labels.build(corpus, backbone, **MASKED)
    _, ctc, _ = labels.build(tmp_path, backbone, name="wav2vec_ctc_st", **MASKED)
    assert classifier.state_dict().keys() == ctc.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blank_mode": "set"}, r"`model.blank_mode` must stay add in wav2vec_label_st.*but is set"),
        ({"blank_weight": 2.0}, r"`model.blank_weight` must stay 0 in wav2vec_label_st.*but is 2.0"),
        ({"fix_mask": True}, r"nothing would be trained: the scores of all 13 masks are fixed"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str, corpus: Path, backbone: Path) -> None:
    with pytest.raises(ValueError, match=message):
        labels.build(corpus, backbone, **options)


def test_model_and_task_must_be_for_the_same_kind_of_labels(corpus: Path, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "dict.ltr.txt").write_text("A 1\nB 1\n")
    utterances = labels.configuration(corpus, backbone)
    frames = labels.configuration(tmp_path, backbone, name="wav2vec_ctc_st")
    with pytest.raises(ValueError, match=r"needs a task with one label per utterance, but the task is AudioCtcTask"):
        tasks.setup_task(frames.task).build_model(utterances.model)
    with pytest.raises(
        ValueError, match=r"needs a task with a dictionary, but the task is AudioLabelsTask; pass task\._n"
    ):
        tasks.setup_task(utterances.task).build_model(frames.model)
