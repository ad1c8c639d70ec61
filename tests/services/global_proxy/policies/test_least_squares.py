import math

import numpy as np
import pytest

from services.global_proxy.policies.least_squares import Fit

PRIOR = (0.01, 1e-4, 1e-4)


def feed(fit: Fit, truth: tuple[float, float, float], num: int, noise: float = 0.0, queue: bool = True) -> None:
    rng = np.random.default_rng(1)
    for _ in range(num):
        x1, x2 = rng.lognormal(6, 1), rng.exponential(3000) * (rng.random() < 0.5) * queue
        fit.observe(x1, x2, (truth[0] + truth[1] * x1 + truth[2] * x2) * rng.lognormal(0, noise))


@pytest.mark.parametrize("truth", [(0.05, 1.2e-3, 1e-3), (0.015, 2e-5, 1e-5), (1.0, 1e-2, 8e-3)])
def test_finds_costs_that_are_nothing_like_the_prior(truth: tuple[float, float, float]) -> None:
    fit = Fit(PRIOR)
    feed(fit, truth, 400, noise=0.1)
    assert fit.theta == pytest.approx(truth, rel=0.25)


def test_what_was_not_seen_keeps_the_priors_proportion() -> None:
    fit = Fit(PRIOR)
    feed(fit, (0.1, 1e-3, 1e-3), 200, queue=False)  # ten times the prior; nothing ever queued
    assert fit.theta[2] == pytest.approx(1e-3, rel=0.1)


def test_follows_when_costs_change() -> None:
    fit = Fit(PRIOR)
    feed(fit, (0.02, 1e-4, 1e-4), 400)
    feed(fit, (0.08, 4e-4, 4e-4), 400)
    assert fit.theta == pytest.approx((0.08, 4e-4, 4e-4), rel=0.1)


def test_an_outlier_does_not_turn_the_fit() -> None:
    fit = Fit(PRIOR)
    feed(fit, PRIOR, 100)
    fit.observe(400, 0, 1000.0)
    feed(fit, PRIOR, 10)
    assert fit.theta[0] + 400 * fit.theta[1] == pytest.approx(0.05, rel=0.2)


def test_no_coefficient_is_lost() -> None:
    fit = Fit(PRIOR)
    feed(fit, (0.5, 0.0, 0.0), 300)
    assert min(fit.theta[1:]) > 5e-5
    assert fit.theta[0] == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    "sample", [(1, 1, 0.0), (1, 1, -1.0), (1, 1, math.nan), (1, 1, math.inf), (-1, 1, 1.0), (1, math.nan, 1.0)]
)
def test_nonsense_is_left_out(sample: tuple[float, float, float]) -> None:
    fit = Fit(PRIOR)
    fit.observe(*sample)
    assert fit.num_samples == 0
    assert fit.theta == PRIOR
