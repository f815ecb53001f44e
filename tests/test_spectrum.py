"""Dividing by a standard deviation: exact moments against closed forms and against samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fixup_init.moments.spectrum import Spectrum

SIZES = (4, 3, 2)
AXES = (0, 1)


def lattice_of(x: np.ndarray) -> np.ndarray:
    """Averages of x_i x_j over samples and pairs, by the axes in which i and j differ."""
    second = np.einsum("sabc,sxyz->abcxyz", x, x) / len(x)
    found, count = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    for i, j in itertools.product(np.ndindex(*SIZES), repeat=2):
        mask = tuple(int(a != b) for a, b in zip(i, j, strict=True))
        found[mask] += second[(*i, *j)]
        count[mask] += 1
    return (found / count)[..., None, None, None]


def scaled(x: np.ndarray) -> np.ndarray:
    """sqrt(E s^2) / s of each group."""
    squares = np.square(x).mean(AXES_OF_SAMPLES, keepdims=True)
    return np.sqrt(squares.mean() / squares)


AXES_OF_SAMPLES = tuple(a + 1 for a in AXES)


def test_equal_directions_are_a_chi_square() -> None:
    """E s^2 E 1/s^2 = N / (N - 2); a cotangent loses one direction of N."""
    flat = np.zeros((2, 2, 1, 1))
    flat[0, 0] = 1.0
    for n in (8, 64, 4096):
        spectrum = Spectrum.of(flat, (1,), (3, n), centred=False)
        assert spectrum.freedom == pytest.approx(n)
        assert spectrum.pulled(flat)[0, 0].item() == pytest.approx(n / (n - 2) * (1 - 1 / n), rel=2e-4)
        assert spectrum.normalized(flat)[0, 0].item() == pytest.approx(1.0, rel=2e-4)
        alone = math.exp(math.lgamma((n - 1) / 2) - math.lgamma(n / 2)) * math.sqrt(n / 2)  # E sqrt(E s^2) / s
        apart = np.zeros_like(flat)
        apart[1] = 1.0  # groups of independent deviations, one cotangent for all of them
        found = spectrum.pulled(apart)[1, 0].item()
        assert found == pytest.approx(alone**2 * (1 - 1 / n) ** 2, rel=2e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_unequal_directions_against_samples(centred: bool) -> None:
    """Entries that have a row, a column and more in common."""
    rng = np.random.default_rng(0)

    def draw(row: float, column: float) -> np.ndarray:
        x = row * rng.normal(size=(100_000, 4, 1, 1)) + column * rng.normal(size=(100_000, 1, 3, 2))
        x = x + rng.normal(size=(100_000, *SIZES))
        return x - centred * x.mean(AXES_OF_SAMPLES, keepdims=True)

    x, g = draw(0.8, 1.1), draw(0.7, 0.4)
    spectrum = Spectrum.of(lattice_of(x), AXES, SIZES, centred)
    squares = np.square(x).mean(AXES_OF_SAMPLES)
    assert spectrum.freedom == pytest.approx(2 * squares.mean() ** 2 / squares.var(), rel=0.05)
    assert spectrum.normalized(lattice_of(x)) == pytest.approx(lattice_of(x * scaled(x)), abs=0.02)
    along = (x * g).mean(AXES_OF_SAMPLES, keepdims=True) / np.square(x).mean(AXES_OF_SAMPLES, keepdims=True)
    pulled = lattice_of((g - x * along) * scaled(x))
    assert spectrum.pulled(lattice_of(g))[:, :, 0] == pytest.approx(pulled[:, :, 0], rel=0.03, abs=0.02)


def test_few_weights_to_a_unit() -> None:
    """x_i = w . z_i of 12 weights: 1/s^2 of the gradient of x, and what of it reaches the layers before."""
    rng = np.random.default_rng(0)
    fan, n = 12, 40
    w, z = rng.normal(size=(20_000, fan)), rng.normal(size=(20, fan, n))
    x = np.stack([w[k :: len(z)] @ z[k] for k in range(len(z))])
    flat = np.zeros((2, 2, 1, 1))
    flat[0, 0] = 1.0
    g = rng.normal(size=x.shape)
    squares = np.square(x).mean(-1, keepdims=True)
    pulled = (g - x * (x * g).mean(-1, keepdims=True) / squares) * np.sqrt(squares.mean() / squares)
    few, many = (Spectrum.of(flat, (1,), (3, n), False, fan=k) for k in (fan, 0))
    assert few.pulled(flat)[0, 0].item() == pytest.approx(np.square(pulled).mean(), rel=0.02)
    assert few.freedom == pytest.approx(1 / (1 / n + 1 / fan))
    back = np.stack([w[k :: len(z)] for k in range(len(z))])[..., None] * pulled[:, :, None, :8]
    assert many.pulled(flat)[0, 0].item() == pytest.approx(np.square(back).mean(), rel=0.02)
