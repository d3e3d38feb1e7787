"""The fine-tuned teacher: hidden states and logits of one forward, and symbols that are matched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.ctc_teacher import CtcTeacher
from s3distill.encoder.symbols import match_symbols
from tests.models import ctc_models

SOURCE = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
PADDING = torch.zeros(2, 6000, dtype=torch.bool)
PADDING[1, 4000:] = True
SOURCE[1, 4000:] = 0
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def read(path: Path, dtype: str = "float32", **options: object) -> CtcTeacher:
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    parsed.model_options |= options
    return CtcTeacher(parsed, dtype, f"teacher {path.name}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ctc_models.write_ctc(tmp_path_factory.mktemp("teacher") / "ctc.pt")


def test_one_forward_gives_what_the_model_computes(path: Path) -> None:
    out, expected = (
        read(path).outputs(SOURCE, PADDING, [0, 2], True),
        s3distill.load(path)(SOURCE, torch.tensor([6000, 4000])),
    )
    valid = ~out.padding_mask
    assert torch.equal(out.padding_mask, expected.padding_mask)
    assert torch.allclose(out.logits[valid], expected.logits[valid], atol=1e-5)
    for layer, state in zip((0, 2), out.hidden_states, strict=True):
        assert torch.allclose(state[valid], expected.hidden_states[layer][valid], atol=1e-5)
    (out.logits * torch.ones(7, requires_grad=True)).sum().backward()  # a graph may be built on it


def test_it_runs_as_deep_as_asked(path: Path) -> None:
    teacher = read(path)
    depths = []
    teacher._encoder.encoder.register_forward_hook(lambda _, args, __: depths.append(args[3]))
    assert teacher.outputs(SOURCE, PADDING, [1], False).logits is None
    teacher.outputs(SOURCE, PADDING, [1], True)
    teacher.outputs(SOURCE, PADDING, [], True)
    assert depths == [1, None, None]


def test_padding_changes_nothing(path: Path) -> None:
    teacher = read(path)
    padded, alone = (teacher.outputs(*batch, [1], True) for batch in ((SOURCE, PADDING), (SOURCE[1:, :4000], None)))
    num_frames = alone.logits.shape[1]
    assert torch.allclose(padded.logits[1:, :num_frames], alone.logits, atol=1e-4)
    assert int(padded.padding_mask[1].logical_not().sum()) == num_frames


def test_blank_weight_is_part_of_its_logits(path: Path) -> None:
    plain = read(path).outputs(SOURCE, PADDING, [], True).logits
    added = read(path, blank_weight=2.0, blank_mode="add").outputs(SOURCE, PADDING, [], True).logits
    fixed = read(path, blank_weight=2.0, blank_mode="set").outputs(SOURCE, PADDING, [], True).logits
    assert torch.allclose(added[..., 0], plain[..., 0] + 2) and torch.equal(added[..., 1:], plain[..., 1:])
    assert bool((fixed[..., 0] == 2).all()) and torch.equal(fixed[..., 1:], plain[..., 1:])


def test_half_precision_gives_float32(path: Path) -> None:
    out = read(path, "bfloat16").outputs(SOURCE, None, [1], True)
    assert out.logits.dtype == out.hidden_states[0].dtype == torch.float32
    reference = read(path).outputs(SOURCE, None, [], True).logits
    assert 0 < (out.logits - reference).abs().max() < 0.5


def test_a_pretrained_teacher_has_no_logits(tmp_path: Path) -> None:
    teacher = read(ctc_models.write_encoder(tmp_path / "pretrained.pt"))
    assert teacher.num_outputs == 0 and len(teacher.outputs(SOURCE, None, [2], False).hidden_states) == 1
    with pytest.raises(ValueError, match=r"needs a teacher with a CTC head, but teacher pretrained\.pt has none"):
        teacher.outputs(SOURCE, None, [2], True)


# ---------------------------------------------------------------- symbols


def test_the_same_symbols_in_another_order_are_matched() -> None:
    found = match_symbols([*SPECIAL, "A", "B", "|", "madeupword0000"], [*SPECIAL, "|", "A", "B"])
    assert found.teacher.tolist() == [0, 1, 2, 3, 6, 4, 5] and found.student.tolist() == list(range(7))
    logits = torch.arange(8.0).expand(2, 3, 8)
    assert found.select(logits, found.teacher)[0, 0].tolist() == [0, 1, 2, 3, 6, 4, 5]
    student = torch.randn(2, 3, 7)
    assert found.select(student, found.student) is student


def test_symbols_that_one_lacks_are_named_or_left_out() -> None:
    teacher, student = [*SPECIAL, "A", "B", "'"], [*SPECIAL, "A", "B", "C"]
    with pytest.raises(ValueError, match="the student lacks \"'\"; the teacher lacks 'C'; train the student on"):
        match_symbols(teacher, student)
    found = match_symbols(teacher, student, "by_symbol")
    assert found.symbols == (*SPECIAL, "A", "B") and found.teacher.tolist() == found.student.tolist() == list(range(6))
    logits = torch.randn(4, 7)
    probabilities = logits.softmax(-1)[:, :6]
    renormalised = probabilities / probabilities.sum(-1, keepdim=True)
    assert torch.allclose(found.select(logits, found.teacher).softmax(-1), renormalised, atol=1e-6)


def test_dictionaries_that_cannot_be_matched() -> None:
    with pytest.raises(ValueError, match="no symbol in common"):
        match_symbols(["A"], ["B"], "by_symbol")
    with pytest.raises(ValueError, match="must be one of exact, by_symbol, but is 'near'"):
        match_symbols(["A"], ["A"], "near")
    with pytest.raises(ValueError, match="the symbols of the teacher must differ, but A comes twice"):
        match_symbols(["A", "A", "B"], ["A", "B"])
