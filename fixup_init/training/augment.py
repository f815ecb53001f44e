"""Image batches as a network sees them: cropped and mirrored at random, normalized, and mixed in pairs.

The order is that of the Fixup paper's training: a zero-padded random crop and a random mirror image on raw
pixels, then normalization, then mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412). Everything works on whole
batches with explicit keys, so it is compiled into the training step and a seed fixes it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped


@dataclass(frozen=True)
class Augment:
    """How training images are varied.

    Attributes:
      crop_padding: black pixels added on each side before a crop of the original size; 0 crops nothing.
      flip: whether half of the images are mirrored left to right.
      mixup: `alpha` of the Beta(alpha, alpha) distribution that the mixing weight is drawn from; 0 mixes nothing.
    """

    crop_padding: int = 4
    flip: bool = True
    mixup: float = 0.0

    def __post_init__(self):
        if self.crop_padding < 0 or self.mixup < 0:
            raise ValueError(f"{self} has a negative setting; crop_padding and mixup are 0 (off) or more")


NO_AUGMENT = Augment(crop_padding=0, flip=False, mixup=0.0)

# CIFAR-10 as in the paper, Fashion-MNIST in proportion. Digits are centered in their 8x8 box: a shift by one pixel
# costs more accuracy in a short training than it brings; and a mirrored digit is none, or another one.
AUGMENT: dict[str, Augment] = {
    "digits": NO_AUGMENT,
    "fashion-mnist": Augment(crop_padding=2, flip=True),
    "cifar10": Augment(crop_padding=4, flip=True),
}


def random_crop(
    key: Array, images: Shaped[Array, "batch height width channels"], padding: int
) -> Shaped[Array, "batch height width channels"]:
    """Shifts each image by up to `padding` pixels in each direction; what comes in from outside is zero."""
    if padding == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def random_flip(
    key: Array, images: Shaped[Array, "batch height width channels"]
) -> Shaped[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def normalize(
    images: Shaped[Array, "batch height width channels"],
    mean: Shaped[ArrayLike, "channels"],
    std: Shaped[ArrayLike, "channels"],
) -> Float[Array, "batch height width channels"]:
    """`(image - mean) / std` for each channel, in float32."""
    return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def mixup(
    key: Array, images: Float[Array, "batch ..."], labels: Int[Array, "batch"], alpha: float
) -> tuple[Float[Array, "batch ..."], Int[Array, "batch"], Float[Array, ""]]:
    """Mixes each image with another of the batch: `lam * image + (1 - lam) * partner`, with one lam for the batch.

    Args:
      key: a random key.
      images: the batch.
      labels: its labels.
      alpha: lam is drawn from Beta(alpha, alpha): near 0 or 1 for a small alpha, uniform for 1. With 0, lam is 1.

    Returns:
      The mixed images, the labels of the partners, and lam. The loss to train on is
      `lam * loss(labels) + (1 - lam) * loss(partner_labels)`.
    """
    if alpha == 0:
        return images, labels, jnp.ones((), images.dtype)
    lam_key, order_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha, dtype=images.dtype)
    partner = jax.random.permutation(order_key, len(images))
    return lam * images + (1 - lam) * images[partner], labels[partner], lam


def prepare(
    key: Array,
    images: Shaped[Array, "batch height width channels"],
    labels: Int[Array, "batch"],
    mean: Shaped[ArrayLike, "channels"],
    std: Shaped[ArrayLike, "channels"],
    augment: Augment,
) -> tuple[Float[Array, "batch height width channels"], Int[Array, "batch"], Float[Array, ""]]:
    """A raw batch through crop, mirror, normalization and mixup; returns what `mixup` returns."""
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    images = random_crop(crop_key, images, augment.crop_padding)
    if augment.flip:
        images = random_flip(flip_key, images)
    return mixup(mix_key, normalize(images, mean, std), labels, augment.mixup)
