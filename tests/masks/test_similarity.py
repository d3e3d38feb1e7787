"""Overlap of masks: closed forms, what chance gives, and which modules are compared."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3distill.masks.bank import BankEntry, MaskBank
from s3distill.masks.similarity import (
    PairCounts,
    count_pair,
    count_pairs,
    layer_of,
    measure_overlap,
    short_name,
    sort_modules,
)

FC = "w2v_model.encoder.layers.{}.fc1"


class FakeBank:
    """A bank in memory: entry -> module -> mask; remembers what was read."""

    def __init__(self, masks: dict[str, dict[str, torch.Tensor]]) -> None:
        self.masks, self.read = masks, []

    @property
    def names(self) -> list[str]:
        return list(self.masks)

    def module_names(self, name: str) -> list[str]:
        return list(self.masks[name])

    def mask(self, name: str, module: str) -> torch.Tensor:
        self.read.append((name, module))
        return self.masks[name][module]


def random_mask(shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def test_counts_and_measures_of_a_table_that_was_worked_out_by_hand() -> None:
    a = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    b = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    counts = count_pair(a, b)
    assert counts == PairCounts(n11=4, n10=2, n01=1, n00=3)
    overlap = measure_overlap([counts])
    assert overlap.cosine == pytest.approx(4 / math.sqrt(6 * 5))
    assert overlap.jaccard == pytest.approx(4 / 7)
    assert (overlap.density_a, overlap.density_b, overlap.num_connections) == (0.6, 0.5, 10)
    assert overlap.chance_cosine == pytest.approx(math.sqrt(0.6 * 0.5))
    p_o, p_e = 0.7, 0.6 * 0.5 + 0.4 * 0.5
    assert overlap.kappa == pytest.approx((p_o - p_e) / (1 - p_e))


def test_independent_masks_have_a_high_cosine_and_no_kappa() -> None:
    sparsity = 0.1
    a, b = (random_mask((1000, 1000), 1 - sparsity, seed) for seed in (1, 2))
    overlap = measure_overlap([count_pair(a, b)])
    assert overlap.cosine == pytest.approx(1 - sparsity, abs=2e-3)
    assert overlap.chance_cosine == pytest.approx(overlap.cosine, abs=2e-3)
    assert overlap.kappa == pytest.approx(0, abs=5e-3)


def test_identical_and_complementary_masks() -> None:
    mask = random_mask((30, 40), 0.5, 3)
    same = measure_overlap([count_pair(mask, mask)])
    assert (same.cosine, same.jaccard, same.kappa) == (1.0, 1.0, 1.0)
    opposite = measure_overlap([count_pair(mask, ~mask)])
    density = same.density_a
    p_e = 2 * density * (1 - density)
    assert (opposite.cosine, opposite.jaccard) == (0.0, 0.0)
    assert opposite.kappa == pytest.approx(-p_e / (1 - p_e)) and opposite.kappa < -0.99


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_measures_follow_from_a_slow_count_and_are_symmetric(bits: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(column) for column in zip(*bits, strict=True))
    n = {key: sum(1 for bit in bits if bit == key) for key in itertools.product((True, False), repeat=2)}
    counts = count_pair(a, b)
    slow = PairCounts(n[True, True], n[True, False], n[False, True], n[False, False])
    assert counts == slow
    overlap, turned = measure_overlap([counts]), measure_overlap([count_pair(b, a)])
    for measure in ("cosine", "chance_cosine", "jaccard", "kappa"):
        assert getattr(overlap, measure) == pytest.approx(getattr(turned, measure), nan_ok=True)
    d_a, d_b = overlap.density_a, overlap.density_b
    p_o, p_e = (slow.n11 + slow.n00) / len(bits), d_a * d_b + (1 - d_a) * (1 - d_b)
    if 0 < d_a < 1 and 0 < d_b < 1:
        assert overlap.kappa == pytest.approx((p_o - p_e) / (1 - p_e))
    else:
        assert math.isnan(overlap.kappa)


def test_a_constant_mask_has_no_kappa_and_a_module_with_one_does_not_count_in_it() -> None:
    full, half = torch.ones(100, dtype=torch.bool), random_mask((100,), 0.5, 1)
    other = random_mask((100,), 0.5, 2)
    for a, b in ((full, half), (half, full), (full, full), (~full, half)):
        assert math.isnan(measure_overlap([count_pair(a, b)]).kappa)
    assert math.isnan(measure_overlap([count_pair(~full, half)]).cosine)
    alone = measure_overlap([count_pair(half, other)])
    beside = measure_overlap([count_pair(half, other), count_pair(full, full)])
    assert beside.kappa == alone.kappa and beside.num_connections == 200
    assert beside.cosine > alone.cosine


def test_chance_is_taken_within_each_module() -> None:
    """Masks that are independent in every module, but keep 90% here and 10% there, share nothing beyond chance."""
    counts = [
        count_pair(random_mask((500, 500), density, seed), random_mask((500, 500), density, seed + 100))
        for seed, density in enumerate((0.9, 0.1))
    ]
    pooled = PairCounts(*(sum(getattr(c, n) for c in counts) for n in ("n11", "n10", "n01", "n00")))
    assert measure_overlap([pooled]).kappa > 0.6
    overlap = measure_overlap(counts)
    assert overlap.kappa == pytest.approx(0, abs=5e-3)
    assert overlap.chance_cosine == pytest.approx(overlap.cosine, abs=3e-3)


def test_equal_modules_add_up() -> None:
    counts = count_pair(random_mask((50, 50), 0.7, 1), random_mask((50, 50), 0.7, 2))
    once, thrice = measure_overlap([counts]), measure_overlap([counts] * 3)
    expected = dataclasses.replace(once, num_modules=3, num_connections=3 * once.num_connections)
    assert dataclasses.astuple(thrice) == pytest.approx(dataclasses.astuple(expected))


def test_a_bank_is_read_once_module_by_module_without_the_head() -> None:
    modules = ["proj", FC.format(10), FC.format(2), "w2v_model.post_extract_proj"]
    bank = FakeBank({n: {m: random_mask((6, 5), 0.5, i) for m in modules} for i, n in enumerate(("en", "nl", "de"))})
    counts = count_pairs(bank)
    assert list(counts) == [("en", "nl"), ("en", "de"), ("nl", "de")]
    order = ["w2v_model.post_extract_proj", FC.format(2), FC.format(10)]
    assert all(list(found) == order for found in counts.values())
    assert bank.read == [(name, module) for module in order for name in ("en", "nl", "de")]
    assert counts["nl", "de"][FC.format(2)] == count_pair(
        bank.masks["nl"][FC.format(2)], bank.masks["de"][FC.format(2)]
    )


def test_pairs_are_compared_on_their_common_modules() -> None:
    masks = [random_mask((4, 4), 0.5, i) for i in range(3)]
    a, b, c = (FC.format(i) for i in range(3))
    bank = FakeBank(
        {"x": {a: masks[0], b: masks[1]}, "y": {b: masks[2], c: masks[0]}, "z": {c: masks[1], a: masks[2], b: masks[0]}}
    )
    counts = count_pairs(bank)
    assert {pair: list(found) for pair, found in counts.items()} == {
        ("x", "y"): [b],
        ("x", "z"): [a, b],
        ("y", "z"): [b, c],
    }


def test_a_real_bank_gives_the_same_counts(tmp_path) -> None:
    rows = random_mask((6, 1), 0.5, 9).expand(6, 5)
    masks = {
        "en": {FC.format(0): random_mask((6, 5), 0.5, 1), FC.format(1): rows},
        "nl": {FC.format(0): random_mask((6, 5), 0.5, 2), FC.format(1): ~rows},
    }
    entries = [BankEntry(name, found, info={"pattern": "rows"}) for name, found in masks.items()]
    bank = MaskBank.create(tmp_path / "bank.safetensors", "0" * 64, 100, entries)
    assert count_pairs(bank) == count_pairs(FakeBank(masks))


def test_names_and_order_of_modules() -> None:
    conv = "w2v_model.feature_extractor.conv_layers.1.0"
    assert [layer_of(m) for m in (FC.format(11), conv, "w2v_model.encoder.pos_conv.0")] == [
        "11",
        "feature_extractor.conv_layers.1.0",
        "pos_conv.0",
    ]
    assert short_name(FC.format(3)) == "layers.3.fc1"
    assert sort_modules([FC.format(10), FC.format(9), conv, FC.format(9)]) == [conv, FC.format(9), FC.format(10)]


def test_errors() -> None:
    mask = random_mask((3, 3), 0.5, 0)
    with pytest.raises(ValueError, match="a comparison needs at least two entries, but the bank has en; add one with"):
        count_pairs(FakeBank({"en": {"fc": mask}}))
    with pytest.raises(ValueError, match="but the bank has none"):
        count_pairs(FakeBank({}))
    with pytest.raises(ValueError, match="in common besides the head 'proj', but 'en' has a and 'nl' has b; compare"):
        count_pairs(FakeBank({"en": {"a": mask, "proj": mask}, "nl": {"b": mask, "proj": mask}}))
    with pytest.raises(ValueError, match="'nl' has no masks"):
        count_pairs(FakeBank({"en": {"a": mask}, "nl": {}}))
    with pytest.raises(
        ValueError, match=r"must have the same shape to be compared, but they have \(3, 3\) and \(2, 3\)"
    ):
        count_pair(mask, mask[:2])
    with pytest.raises(ValueError, match=r"a mask must be bool, but is torch.float32"):
        count_pair(mask.float(), mask)
