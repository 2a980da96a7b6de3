"""Confidence intervals of rates and means, of one sample and of the difference of two.

Rates: Wilson's score interval (Wilson 1927), and for differences Newcombe's hybrid of two of them
(Newcombe 1998, method 10). Means: Student's t, and for differences Welch's (Welch 1947).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the bounds that hold it; None where the sample says nothing of them."""

    estimate: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """n numbers, by their sum and their sum of squares."""

    n: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def variance(self) -> float:
        """Unbiased; of at least two numbers."""
        return max(0.0, self.squares - self.total**2 / self.n) / (self.n - 1)


def rate(hits: float, n: int, confidence: float = CONFIDENCE) -> Interval | None:
    """hits / n by Wilson's score interval; None of nothing."""
    return None if n == 0 else Interval(hits / n, *_wilson(hits / n, n, confidence))


def rate_difference(
    hits: float, n: int, other_hits: float, other_n: int, confidence: float = CONFIDENCE
) -> Interval | None:
    """hits / n - other_hits / other_n."""
    if n == 0 or other_n == 0:
        return None
    p, q = hits / n, other_hits / other_n
    low, high = _wilson(p, n, confidence)
    other_low, other_high = _wilson(q, other_n, confidence)
    below = math.hypot(p - low, other_high - q)
    above = math.hypot(high - p, q - other_low)
    return Interval(p - q, max(-1.0, p - q - below), min(1.0, p - q + above))


def mean(sample: Sample, confidence: float = CONFIDENCE) -> Interval | None:
    """The mean; without bounds of a single number, None of nothing."""
    if sample.n == 0:
        return None
    if sample.n == 1:
        return Interval(sample.mean, None, None)
    half = t_quantile(confidence, sample.n - 1) * math.sqrt(sample.variance / sample.n)
    return Interval(sample.mean, sample.mean - half, sample.mean + half)


def mean_difference(
    sample: Sample, other: Sample, confidence: float = CONFIDENCE
) -> Interval | None:
    """sample.mean - other.mean, with the degrees of freedom of Welch and Satterthwaite."""
    if sample.n == 0 or other.n == 0:
        return None
    difference = sample.mean - other.mean
    if sample.n == 1 or other.n == 1:
        return Interval(difference, None, None)
    a, b = sample.variance / sample.n, other.variance / other.n
    if a + b == 0:
        return Interval(difference, difference, difference)
    freedom = (a + b) ** 2 / (a**2 / (sample.n - 1) + b**2 / (other.n - 1))
    half = t_quantile(confidence, freedom) * math.sqrt(a + b)
    return Interval(difference, difference - half, difference + half)


def t_quantile(confidence: float, freedom: float) -> float:
    """The t that |T| stays below with this probability: 12.71 for 0.95 and one degree.

    P(|T| > t) = I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t²), solved by bisection.
    """
    if freedom > 1e6:
        return _z(confidence)
    low, high = 0.0, 1.0
    while _beyond(high, freedom) > 1 - confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, freedom) > 1 - confidence else (low, middle)
    return (low + high) / 2


def _wilson(p: float, n: int, confidence: float) -> tuple[float, float]:
    z = _z(confidence)
    z2 = z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _beyond(t: float, freedom: float) -> float:
    return _beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """Its continued fraction (Abramowitz and Stegun 26.5.8), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 400):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return value
