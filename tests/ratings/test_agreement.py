"""Agreement of raters, against statsmodels and published examples."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import inter_rater

from qlora_lab.errors import ShapeError
from qlora_lab.ratings.agreement import cohen_kappa, fleiss_kappa, kendall_tau, krippendorff_alpha, spearman_rho

NAN = np.nan


def random_ratings(raters: int, items: int = 60, seed: int = 0) -> np.ndarray:
    """Return ratings (raters, items) from 0 to 2 that agree more often than by chance."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 3, items)
    noisy = generator.random((raters, items)) < 0.4
    return np.where(noisy, generator.integers(0, 3, (raters, items)), truth)


def test_cohens_kappa_is_statsmodels() -> None:
    one, other = random_ratings(2)
    table, _ = inter_rater.to_table(np.stack([one, other], axis=1))
    assert cohen_kappa(list(one), list(other)) == pytest.approx(inter_rater.cohens_kappa(table).kappa)


def test_fleiss_kappa_is_statsmodels() -> None:
    counts, _ = inter_rater.aggregate_raters(random_ratings(4).T)
    assert fleiss_kappa(counts.astype(float)) == pytest.approx(inter_rater.fleiss_kappa(counts))


def test_krippendorffs_alpha_of_his_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, missing data."""
    ratings = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
            [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
        ]
    )
    assert krippendorff_alpha(ratings) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(ratings, ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_who_always_says_the_same_agrees_by_chance_alone() -> None:
    assert np.isnan(cohen_kappa(["tie"] * 3, ["tie"] * 3))
    assert np.isnan(fleiss_kappa(np.array([[3.0, 0.0], [3.0, 0.0]])))
    assert np.isnan(krippendorff_alpha(np.ones((2, 3))))


def test_other_numbers_of_ratings_are_refused() -> None:
    with pytest.raises(ShapeError, match="got 1 and 2"):
        cohen_kappa([1], [1, 2])
    with pytest.raises(ShapeError, match="same number of ratings"):
        fleiss_kappa(np.array([[2.0, 0.0], [1.0, 2.0]]))


def test_rankings_with_ties_are_compared_as_scipy_does_many_at_once() -> None:
    one, other = np.random.default_rng(0).integers(0, 4, (2, 20, 6)).astype(float)
    taus, rhos = kendall_tau(one, other), spearman_rho(one, other)
    for mine, theirs, tau, rho in zip(one, other, taus, rhos, strict=True):
        assert tau == pytest.approx(stats.kendalltau(mine, theirs).statistic)
        assert rho == pytest.approx(stats.spearmanr(mine, theirs).statistic)
