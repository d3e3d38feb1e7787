"""Heads of several teachers: keys, layers and widths of each."""

from __future__ import annotations

import pytest
import torch

from s3distill.heads import HeadsConfig, LayerHeads, TeacherHeads, parse_pairs_per_teacher

CONFIGS = [
    HeadsConfig(((0, 0), (2, 4)), student_dim=4, teacher_dim=6, num_student_layers=3),
    HeadsConfig(((1, 8), (3, 24)), student_dim=4, teacher_dim=9, num_student_layers=3, sharing="own", init="default"),
]


def states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, generator=generator) for _ in range(4)]


def test_one_teacher_is_layer_heads() -> None:
    torch.manual_seed(0)
    plain = LayerHeads(CONFIGS[1])
    torch.manual_seed(0)
    heads = TeacherHeads(CONFIGS[1:])
    assert list(heads.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(heads(states()), plain(states()), strict=True))
    assert heads.predict_others(states()) == [] and heads.by_teacher == [heads] and heads.deepest_layer == 3


def test_each_teacher_has_its_own() -> None:
    heads = TeacherHeads(CONFIGS)
    assert {key.split(".")[0] for key in heads.state_dict()} == {"linears", "others"}
    assert {key for key in heads.state_dict() if key.startswith("others")} == {
        f"others.0.linears.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert [tuple(p.shape) for p in heads(states())] == [(2, 5, 6)] * 2
    (others,) = heads.predict_others(states())
    assert [tuple(p.shape) for p in others] == [(2, 5, 9)] * 2
    assert [h.pairs for h in heads.by_teacher] == [((0, 0), (2, 4)), ((1, 8), (3, 24))]
    assert heads.deepest_layer == 3 and TeacherHeads(CONFIGS[:1]).deepest_layer == 2
    before = heads(states())
    torch.nn.init.zeros_(heads.by_teacher[1].linears[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(heads(states()), before, strict=True))
    assert not torch.equal(heads.predict_others(states())[0][0], others[0])


def test_each_is_fitted_to_its_teacher() -> None:
    heads, hidden = TeacherHeads(CONFIGS), states()
    generator = torch.Generator().manual_seed(1)
    for of_one in heads.by_teacher:
        weight = torch.randn(of_one.config.teacher_dim, 4, generator=generator)
        targets = {teacher: hidden[student] @ weight.T + 1 for student, teacher in of_one.pairs}
        of_one.fit_least_squares(hidden, [targets.get(i, hidden[0]) for i in range(25)])
        for prediction, (_, teacher) in zip(of_one(hidden), of_one.pairs, strict=True):
            torch.testing.assert_close(prediction, targets[teacher], rtol=1e-3, atol=1e-3)


def test_load_matching_takes_all_teachers_or_none() -> None:
    torch.manual_seed(2)
    source, target = TeacherHeads(CONFIGS), TeacherHeads(CONFIGS)
    assert target.load_matching(source.state_dict())
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    assert not TeacherHeads(CONFIGS[:1]).load_matching(source.state_dict())
    assert not target.load_matching(TeacherHeads(CONFIGS[:1]).state_dict())


def test_parse_pairs_per_teacher() -> None:
    assert parse_pairs_per_teacher("0,4", 1) == [((0, 0), (4, 4))]
    assert parse_pairs_per_teacher("0,4", 3) == [((0, 0), (4, 4))] * 3
    assert parse_pairs_per_teacher("0,4;1:8", 2) == [((0, 0), (4, 4)), ((1, 8),)]
    with pytest.raises(ValueError, match="there are 3 groups for 2 teachers: '0;1;2'"):
        parse_pairs_per_teacher("0;1;2", 2)
    with pytest.raises(ValueError, match="2 groups for 1 teacher: "):
        parse_pairs_per_teacher("0;1", 1)
    with pytest.raises(ValueError, match="'x' is no layer"):
        parse_pairs_per_teacher("0;x", 2)
