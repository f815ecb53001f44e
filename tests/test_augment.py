"""Augmentation: what may change in a batch, how often, and that a key fixes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fixup_init.training import AUGMENT, Augment, load
from fixup_init.training.augment import mixup, normalize, prepare, random_crop, random_flip

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), dtype=np.uint8))  # no zero pixel
LABELS = jnp.arange(64) % 10


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_every_crop_is_a_shift_with_zeros_and_every_shift_occurs(padding):
    images = jnp.tile(IMAGES, (40, 1, 1, 1))
    cropped = np.asarray(random_crop(KEY, images, padding))
    assert cropped.shape == images.shape and cropped.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size, seen, explained = 2 * padding + 1, np.zeros(len(images), int), set()
    for top in range(size):
        for left in range(size):
            same = (cropped == padded[:, top : top + 6, left : left + 5]).all((1, 2, 3))
            seen += same
            explained |= {(top, left)} if same.any() else set()
    # A shift beyond the image gives all zeros, which several shifts explain.
    assert (seen >= 1).all() and len(explained) == size**2


def test_no_padding_is_no_crop():
    assert random_crop(KEY, IMAGES, 0) is IMAGES


def test_half_of_the_images_are_mirrored_left_to_right_and_nothing_else():
    images = jnp.tile(IMAGES, (30, 1, 1, 1))
    flipped = random_flip(KEY, images)
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()
    assert abs(float(mirrored.mean()) - 0.5) < 4 * 0.5 / len(images) ** 0.5


def test_normalized_digits_have_mean_zero_and_variance_one():
    digits = load("digits")
    x = normalize(jnp.asarray(digits.train_images), digits.mean, digits.std)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


def test_mixup_mixes_images_and_labels_with_one_weight():
    x = IMAGES.astype(jnp.float32)
    x = x.at[:, 0, 0, 0].set(jnp.arange(64.0))  # each image carries its own number, so a mixture shows its parts
    mixed, partner_labels, lam = mixup(KEY, x, jnp.arange(64), 1.0)
    assert 0 < lam < 1
    partner = np.asarray(partner_labels)
    np.testing.assert_allclose(mixed, lam * x + (1 - lam) * x[partner], rtol=1e-6)
    assert sorted(partner) == list(range(64)) and (partner != np.arange(64)).any()


def test_the_weight_of_mixup_follows_the_beta_distribution():
    draw = jax.vmap(lambda key, alpha: mixup(key, jnp.zeros((2, 1)), jnp.zeros(2, int), alpha)[2], in_axes=(0, None))
    for alpha in (0.2, 1.0, 4.0):
        lams = draw(jax.random.split(KEY, 4000), alpha)
        variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
        assert abs(float(lams.mean()) - 0.5) < 4 * (variance / 4000) ** 0.5
        np.testing.assert_allclose(lams.var(), variance, rtol=0.1)


def test_without_mixup_labels_count_fully():
    x = IMAGES.astype(jnp.float32)
    mixed, partners, lam = mixup(KEY, x, LABELS, 0.0)
    assert mixed is x and partners is LABELS and lam == 1


def test_a_key_fixes_the_whole_preparation():
    augment = Augment(crop_padding=2, flip=True, mixup=0.7)
    make = jax.jit(prepare, static_argnames="augment")
    one, same, other = (
        make(key, IMAGES, LABELS, np.zeros(3), np.ones(3), augment=augment) for key in (KEY, KEY, jax.random.key(1))
    )
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one[0] != other[0]).any() and one[2] != other[2]


def test_padding_is_black_before_normalization():
    """A black pixel that comes in at the border is -mean/std for the network, not the mean color."""
    black = jnp.zeros((8, 4, 4, 1), jnp.uint8)
    x, _, _ = prepare(KEY, black, LABELS[:8], np.array([100.0]), np.array([50.0]), Augment(crop_padding=2))
    np.testing.assert_array_equal(x, -2.0)


def test_digits_are_never_mirrored_by_default_and_cifar10_is_as_in_the_paper():
    assert not AUGMENT["digits"].flip and AUGMENT["cifar10"] == Augment(crop_padding=4, flip=True, mixup=0.0)


@pytest.mark.parametrize("wrong", [{"crop_padding": -1}, {"mixup": -0.1}])
def test_negative_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="negative setting"):
        Augment(**wrong)
