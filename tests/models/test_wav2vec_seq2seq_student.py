"""`wav2vec_seq2seq_student` against stock `wav2vec_seq2seq`; decoders that start from a trained one; several texts per utterance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from tests.encoder import checkpoints, folders
from tests.masks.students import write_compact_student
from tests.models import seq2seq


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seq2seq.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seq2seq.write_backbone(tmp_path_factory.mktemp("backbone") / "pretrained.pt")


@pytest.fixture(scope="module")
def teacher(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model with a decoder of four layers."""
    parts = seq2seq.build(data, backbone, "wav2vec_seq2seq", decoder_layers=4)
    return seq2seq.save(tmp_path_factory.mktemp("teacher") / "teacher.pt", *parts)


def logits_of(model: Any, sample: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{**sample["net_input"], **more})[0]


def test_it_computes_what_the_stock_model_does_and_takes_its_weights(data: Path, backbone: Path) -> None:
    task, stock, _ = seq2seq.build(data, backbone, "wav2vec_seq2seq")
    _, ours, _ = seq2seq.build(data, backbone)
    ours.load_state_dict(stock.state_dict(), strict=False)
    # the pre-training's parts that fairseq's own encoder keeps when it is fine-tuned are none
    assert set(ours.state_dict()) == set(stock.state_dict())
    for rows in ((1,), (0, 1, 2, 3, 4)):
        sample = seq2seq.batch(task, rows=rows)
        expected, got = logits_of(stock, sample), logits_of(ours, sample)
        said = sample["target"] != task.target_dictionary.pad()
        assert (got - expected)[said].abs().max() <= 1e-4 * expected[said].abs().max()


def test_padding_changes_nothing(data: Path, backbone: Path) -> None:
    task, model, _ = seq2seq.build(data, backbone)
    seq2seq.make_talkative(model)
    together = logits_of(model, seq2seq.batch(task))
    for row, text in enumerate(seq2seq.TEXTS):
        alone = logits_of(model, seq2seq.batch(task, rows=(row,)))[0]
        assert torch.allclose(together[row, : len(text.split()) + 1], alone, atol=1e-4)
    assert not torch.allclose(together[0, 0], together[1, 0], atol=1e-2)  # what is said depends on the audio


def test_several_texts_of_an_utterance_are_as_the_audio_said_several_times(data: Path, backbone: Path) -> None:
    task, model, _ = seq2seq.build(data, backbone)
    one, five = seq2seq.batch(task, rows=(1,)), seq2seq.batch(task)
    texts = torch.nn.utils.rnn.pad_sequence(five["net_input"]["prev_output_tokens"], True, task.target_dictionary.pad())
    utterances = torch.tensor([0, 0, 1, 0, 1])
    sample = seq2seq.batch(task, rows=(1, 3))
    got = logits_of(model, sample, prev_output_tokens=texts, utterances=utterances)
    other = seq2seq.batch(task, rows=(3,))
    for text, utterance in enumerate(utterances.tolist()):
        alone = logits_of(model, (one, other)[utterance], prev_output_tokens=texts[text : text + 1])
        length = len(seq2seq.TEXTS[text].split()) + 1
        assert torch.allclose(got[text, :length], alone[0, :length], atol=1e-4)


@pytest.mark.parametrize(
    ("choice", "layers"), [("first:2", [0, 1]), ("every:3", [0, 3]), ("3,1", [3, 1]), ("", [0, 1, 2, 3])]
)
def test_a_decoder_starts_from_layers_of_a_trained_one(
    data: Path, backbone: Path, teacher: Path, choice: str, layers: list[int]
) -> None:
    start = {"decoder_path": str(teacher), "decoder_init_layers": choice, "decoder_layers": len(layers)}
    _, model, _ = seq2seq.build(data, backbone, **start)
    theirs = compat.load_checkpoint(teacher)["model"]
    own = model.decoder.state_dict()
    for new, old in enumerate(layers):
        names = [name for name in own if name.startswith(f"layers.{new}.")]
        assert len(names) == 26
        for name in names:
            assert torch.equal(own[name], theirs["decoder." + name.replace(f"layers.{new}.", f"layers.{old}.", 1)])
    for name in ("embed_tokens.weight", "embed_out"):
        assert torch.equal(own[name], theirs[f"decoder.{name}"])


def test_a_checkpoint_rebuilds_without_any_other_file(data: Path, tmp_path: Path) -> None:
    backbone = seq2seq.write_backbone(tmp_path / "pretrained.pt")
    start = seq2seq.save(tmp_path / "teacher.pt", *seq2seq.build(data, backbone, "wav2vec_seq2seq"))
    task, model, cfg = seq2seq.build(data, backbone, decoder_path=str(start))
    path = seq2seq.save(tmp_path / "student.pt", task, model, cfg)
    expected = logits_of(model, seq2seq.batch(task))
    backbone.unlink()
    start.unlink()
    from fairseq import checkpoint_utils

    (rebuilt,), _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    assert torch.equal(logits_of(rebuilt, seq2seq.batch(task)), expected)


def test_its_encoder_is_a_backbone_again(data: Path, backbone: Path, tmp_path: Path) -> None:
    task, model, cfg = seq2seq.build(data, backbone)
    path = seq2seq.save(tmp_path / "student.pt", task, model, cfg)
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    assert parsed.config == model.encoder.w2v_model.config and parsed.head_state is None
    _, again, _ = seq2seq.build(data, path)
    weight = "encoder.w2v_model.encoder.layers.1.fc1.weight"
    assert torch.equal(again.state_dict()[weight], model.state_dict()[weight])


def _compact(path: Path) -> Path:
    return write_compact_student(path / "compact.pt")


def _wavlm(path: Path) -> Path:
    return checkpoints.save(folders.released_wavlm(), path / "wavlm.pt")


def _transformers(path: Path) -> Path:
    return folders.write(path / "folder", folders.build("hubert"))


def _ctc(path: Path) -> Path:
    return checkpoints.save(checkpoints.fine_tuned("wav2vec2", checkpoints.SMALL)[0], path / "ctc.pt")


@pytest.mark.parametrize("write", [_compact, _wavlm, _transformers, _ctc])
def test_any_encoder_that_can_be_read_is_one(data: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    task, model, cfg = seq2seq.build(data, path, task={"normalize": parsed.normalize})
    own = model.encoder.w2v_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in parsed.encoder_state.items() if name in own)
    saved = seq2seq.save(tmp_path / "student.pt", task, model, cfg)
    again = parse_checkpoint(compat.load_checkpoint(saved))
    assert again.config == parsed.config == model.encoder.w2v_model.config
    assert logits_of(model, seq2seq.batch(task)).isfinite().all()


def test_the_encoder_can_stay_frozen_at_first(data: Path, backbone: Path) -> None:
    task, model, _ = seq2seq.build(data, backbone, freeze_finetune_updates=2)
    learned = []
    for num_updates in (1, 2):
        model.train().zero_grad()
        model.set_num_updates(num_updates)
        model(**seq2seq.batch(task)["net_input"])[0].sum().backward()
        learned.append(model.encoder.w2v_model.post_extract_proj.weight.grad is not None)
        assert model.encoder.proj.weight.grad is not None
    assert learned == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decoder_path": "TEACHER"},
            r"`model.decoder_layers` must be the number of layers taken from .*, 4 \(0,1,2,3\), but is 2; pass",
        ),
        (
            {"decoder_path": "TEACHER", "decoder_init_layers": "5"},
            r"`decoder_init_layers` must name .* layers \[5\], which are lacking",
        ),
        (
            {"decoder_path": "TEACHER", "decoder_init_layers": "none"},
            "must read like 'first:2', 'every:4' or '0,4,8', but is 'none'",
        ),
        (
            {"decoder_path": "TEACHER", "decoder_init_layers": "first:2", "decoder_ffn_embed_dim": 8},
            "must have its shape, but has decoder_ffn_embed_dim 8; pass model.decoder_ffn_embed_dim=24",
        ),
        (
            {"decoder_path": "BACKBONE"},
            "must be of a model with a decoder, such as wav2vec_seq2seq, but is of 'wav2vec2'",
        ),
        ({"decoder_init_layers": "first:2"}, "names layers of model.decoder_path, but that is empty"),
        ({"freeze_regex": ".*"}, "`model.freeze_regex` has no effect on wav2vec_seq2seq_student and must stay None"),
    ],
)
def test_what_cannot_work_is_refused(data: Path, backbone: Path, teacher: Path, options: dict, message: str) -> None:
    files = {"TEACHER": str(teacher), "BACKBONE": str(backbone)}
    options = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        seq2seq.build(data, backbone, **options)


def test_a_decoder_of_another_dictionary_is_refused(data: Path, backbone: Path, teacher: Path, tmp_path: Path) -> None:
    other = seq2seq.write_corpus(tmp_path / "other")
    (other / "dict.ltr.txt").write_text("| 1\nA 1\nB 1\nC 1\nD 1\nX 1\n")
    with pytest.raises(
        ValueError, match=r"dictionary of task.data must be that of .*'E', 'X' in one of them only; copy"
    ):
        seq2seq.build(other, backbone, decoder_path=str(teacher), decoder_init_layers="first:2")
    (other / "dict.ltr.txt").write_text("A 1\n| 1\nB 1\nC 1\nD 1\nE 1\n")
    with pytest.raises(ValueError, match="their order differs"):
        seq2seq.build(other, backbone, decoder_path=str(teacher), decoder_init_layers="first:2")


def test_it_needs_texts_to_read(data: Path, backbone: Path) -> None:
    with pytest.raises(ValueError, match=r"`task.autoregressive` must be true for wav2vec_seq2seq_student"):
        seq2seq.build(data, backbone, task={"autoregressive": False})
