"""Statistics over mask similarities: the comparison of a bank, Mantel's test against brute force, and clustering."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from s3distill.analysis.mask_similarity import (
    MaskComparison,
    cluster,
    compare_masks,
    import_scipy,
    mantel_test,
    sort_by_cluster,
)
from s3distill.data.similarity_csv import SimilarityMatrix
from s3distill.masks.bank import BankEntry, MaskBank
from s3distill.masks.similarity import count_pairs, measure_overlap

pytest.importorskip("scipy")

MODULES = (
    "w2v_model.post_extract_proj",
    *(f"w2v_model.encoder.layers.{i}.{fc}" for i in range(2) for fc in ("fc1", "fc2")),
)
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def bank(tmp_path: Path) -> MaskBank:
    """a and b share much, c is on its own; c does not mask the projection, and has a head."""
    generator = torch.Generator().manual_seed(0)
    shared = {module: torch.rand(12, 10, generator=generator) for module in MODULES}
    entries = []
    for name, weight in (("a", 1.0), ("b", 1.0), ("c", 0.0)):
        scores = {m: weight * s + 0.3 * torch.rand(12, 10, generator=generator) for m, s in shared.items()}
        masks = {m: s > s.median() for m, s in scores.items() if name != "c" or "post" not in m}
        entries.append(BankEntry(name, {**masks, "proj": torch.ones(3, 4, dtype=torch.bool)}))
    return MaskBank.create(tmp_path / "bank.safetensors", "0" * 64, 1000, entries)


def random_matrix(seed: int, names: tuple[str, ...] = NAMES) -> SimilarityMatrix:
    values = np.random.default_rng(seed).normal(size=(len(names), len(names)))
    return SimilarityMatrix(names, values + values.T)


def test_comparison_by_layer_and_by_module(bank: MaskBank) -> None:
    counts = count_pairs(bank)
    comparison = compare_masks(bank)
    assert comparison.names == ("a", "b", "c") and comparison.grouping == "layer"
    assert list(comparison.groups) == ["post_extract_proj", "0", "1"]
    assert list(comparison.groups["post_extract_proj"]) == [("a", "b")]
    layer = measure_overlap([counts["a", "c"][m] for m in MODULES if "layers.1" in m])
    assert comparison.groups["1"]["a", "c"] == layer and layer.num_modules == 2
    assert comparison.pairs["a", "b"] == measure_overlap(counts["a", "b"].values())
    assert comparison.left_out == {"a": ("post_extract_proj",), "b": ("post_extract_proj",)}
    by_module = compare_masks(bank, "module")
    assert list(by_module.groups) == [
        "post_extract_proj",
        "layers.0.fc1",
        "layers.0.fc2",
        "layers.1.fc1",
        "layers.1.fc2",
    ]
    assert by_module.pairs == comparison.pairs


def test_matrix_is_symmetric_and_has_ones_on_its_diagonal(bank: MaskBank) -> None:
    comparison = compare_masks(bank)
    for measure in ("kappa", "cosine", "jaccard"):
        values = comparison.matrix(measure).values
        np.testing.assert_array_equal(values, values.T)
        assert np.diag(values).tolist() == [1, 1, 1]
        assert values[0, 2] == getattr(comparison.pairs["a", "c"], measure)
    assert comparison.matrix("kappa").values[0, 1] > 0.5 > abs(comparison.matrix("kappa").values[0, 2])


def slow_mantel(a: np.ndarray, b: np.ndarray, kind: str) -> tuple[float, float, float]:
    """Every order of four names, by scipy and loops."""
    statistic = getattr(import_scipy("stats"), {"pearson": "pearsonr", "spearman": "spearmanr"}[kind])
    pairs = list(itertools.combinations(range(len(a)), 2))

    def correlate(order: tuple[int, ...]) -> float:
        return statistic([a[i, j] for i, j in pairs], [b[order[i], order[j]] for i, j in pairs])[0]

    observed = correlate(tuple(range(len(a))))
    found = [correlate(order) for order in itertools.permutations(range(len(a)))]
    far = sum(abs(r) >= abs(observed) - 1e-9 for r in found)
    return observed, far / len(found), sum(r >= observed - 1e-9 for r in found) / len(found)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("seed", range(4))
def test_mantel_is_brute_force_on_four_names(seed: int, kind: str) -> None:
    a, b = random_matrix(seed), random_matrix(seed + 100)
    test = mantel_test(a, b, permutations=24, correlation=kind)
    assert (test.exact, test.num_permutations) == (True, 24)
    assert (test.correlation, test.p_two_sided, test.p_greater) == pytest.approx(slow_mantel(a.values, b.values, kind))


def test_random_permutations_come_near_to_all_and_follow_the_seed() -> None:
    names = tuple("abcdef")
    a, b = random_matrix(1, names), random_matrix(2, names)
    exact = mantel_test(a, b, permutations=720)
    some = mantel_test(a, b, permutations=719, seed=1)
    assert exact.exact and not some.exact and some.num_permutations == 719
    assert some.p_two_sided == pytest.approx(exact.p_two_sided, abs=0.06)
    assert mantel_test(a, b, permutations=719, seed=1) == some != mantel_test(a, b, permutations=719, seed=2)


def test_the_order_as_it_is_counts_once() -> None:
    """The smallest p is 1 / (permutations + 1) of random ones, and never 0."""
    names = tuple("abcdefgh")
    a = random_matrix(0, names)
    test = mantel_test(a, a, permutations=99)
    assert test.correlation == pytest.approx(1) and test.p_two_sided == test.p_greater == 1 / 100
    negative = SimilarityMatrix(names, -a.values)
    test = mantel_test(a, negative, permutations=99)
    assert (test.p_two_sided, test.p_greater) == (1 / 100, 1.0)
    exact = mantel_test(random_matrix(0), random_matrix(0))
    assert exact.p_two_sided == 1 / 24


def test_p_values_of_unrelated_similarities_are_uniform() -> None:
    """At any level, no more of them are below it than that level, and not many fewer."""
    names = tuple("abcdefgh")
    tests = [mantel_test(random_matrix(i, names), random_matrix(1000 + i, names), 199, seed=i) for i in range(400)]
    for p_values in ([t.p_two_sided for t in tests], [t.p_greater for t in tests]):
        for level in (0.05, 0.1, 0.25, 0.5, 0.75):
            expected_error = math.sqrt(level * (1 - level) / len(tests))
            assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=3.5 * expected_error)


def test_the_diagonal_is_not_used() -> None:
    a, b = random_matrix(3), random_matrix(4)
    other = b.values.copy()
    np.fill_diagonal(other, 100)
    assert mantel_test(a, b) == mantel_test(a, SimilarityMatrix(NAMES, other))


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_what_is_the_same_for_all_pairs_or_not_defined_has_no_correlation(value: float) -> None:
    values = random_matrix(1).values
    values[0, 1] = values[1, 0] = value
    b = SimilarityMatrix(NAMES, values if math.isnan(value) else np.full((4, 4), value))
    test = mantel_test(random_matrix(0), b)
    assert all(map(math.isnan, (test.correlation, test.p_two_sided, test.p_greater))) and test.num_permutations == 0


def test_alike_names_become_neighbours(bank: MaskBank) -> None:
    values = np.full((4, 4), 0.1)
    values[0, 2] = values[2, 0] = values[1, 3] = values[3, 1] = 0.8
    matrix = SimilarityMatrix(NAMES, values)
    linkage = cluster(matrix)
    assert linkage is not None
    assert {frozenset(p) for p in np.split(np.array(sort_by_cluster(NAMES, linkage)), 2)} == {
        frozenset("ac"),
        frozenset("bd"),
    }
    np.testing.assert_allclose(linkage[:, 2], [0.2, 0.2, 0.9])
    values[0, 1] = values[1, 0] = math.nan
    assert cluster(matrix) is None and sort_by_cluster(NAMES, None) == list(NAMES)


def test_errors(bank: MaskBank, monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_matrix(0)
    with pytest.raises(ValueError, match="`by` must be one of layer, module, but is 'head'"):
        compare_masks(bank, "head")
    with pytest.raises(ValueError, match="the same names in the same order, but have a, b, c, d and b, a, c, d"):
        mantel_test(a, random_matrix(0, ("b", "a", "c", "d")))
    with pytest.raises(ValueError, match="needs at least 3 entries, but there are a, b; leave the reference out"):
        mantel_test(random_matrix(0, ("a", "b")), random_matrix(1, ("a", "b")))
    with pytest.raises(ValueError, match="`permutations` must be at least 1, but is 0; 9999 gives"):
        mantel_test(a, a, permutations=0)
    with pytest.raises(ValueError, match="`correlation` must be one of pearson, spearman, but is 'kendall'"):
        mantel_test(a, a, correlation="kendall")

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(
        RuntimeError, match=r"needs scipy, which is not installed; run: pip install 's3distill\[plots\]'"
    ):
        cluster(a)


def test_a_comparison_can_be_made_without_scipy(bank: MaskBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    comparison = compare_masks(bank)
    assert isinstance(comparison, MaskComparison)
    assert not math.isnan(mantel_test(comparison.matrix("kappa"), random_matrix(0, comparison.names)).correlation)
