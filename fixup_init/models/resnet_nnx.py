"""The residual networks of `fixup_init.models.resnet` in NNX, with batch norm or none: same names, same function.

Both definitions read the same tables of branches and stages, so a difference in structure or plan can only come from
the framework.

References:
  He et al. 2015, Deep Residual Learning (arXiv:1512.03385); He et al. 2016, Identity Mappings (arXiv:1603.05027).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from fixup_init.models.resnet import (
    BRANCHES,
    SHORTCUTS,
    STEMS,
    Layer,
    check_images,
    check_option,
    cifar_stages,
    he_normal,
    imagenet_stages,
    is_transition,
    max_pool,
    pad_shortcut,
)


class Identity(nnx.Module):
    """Stands where a network has no norm."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        del features, rngs

    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Returns x."""
        del use_running_average
        return x


NORMS: dict[str, Callable[..., nnx.Module]] = {
    "batch": partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5),
    "none": Identity,
}


def make_conv(channels: int, layer: Layer, rngs: nnx.Rngs) -> nnx.Conv:
    """Returns the convolution `layer` for an input with so many channels."""
    return nnx.Conv(
        channels,
        layer.features,
        (layer.size, layer.size),
        strides=layer.stride,
        padding=layer.size // 2,
        use_bias=False,
        kernel_init=he_normal,
        rngs=rngs,
    )


class Block(nnx.Module):
    """What both residual blocks share: `conv1`, `norm1`, ... of the branch and the way around it.

    Args:
      channels: Channels of the input.
      layers: The m convolutions of the branch, in order.
      norm: Makes a norm from a number of channels.
      shortcut: "projection" or "pad", where the branch changes the shape.
      rngs: Source of the parameters.
    """

    preactivation = False

    def __init__(
        self, channels: int, layers: tuple[Layer, ...], norm: Callable[..., Any], shortcut: str, rngs: nnx.Rngs
    ) -> None:
        self.m = len(layers)
        self.shortcut = Layer(1, layers[-1].features, math.prod(layer.stride for layer in layers))
        self.transition = is_transition(channels, layers)
        widths = (channels, *(layer.features for layer in layers))
        for i, layer in enumerate(layers, 1):
            setattr(self, f"conv{i}", make_conv(widths[i - 1], layer, rngs))
            setattr(self, f"norm{i}", norm(widths[i - 1] if self.preactivation else widths[i], rngs=rngs))
        if self.transition and shortcut == "projection":
            self.downsample = make_conv(channels, self.shortcut, rngs)
            self.downsample_norm = (Identity if self.preactivation else norm)(widths[-1], rngs=rngs)

    def conv(self, x: Array, i: int) -> Array:
        """The i-th convolution of the branch, counted from 1."""
        return getattr(self, f"conv{i}")(x)

    def norm(self, x: Array, i: int, train: bool) -> Array:
        """The i-th norm of the branch, counted from 1."""
        return getattr(self, f"norm{i}")(x, use_running_average=not train)

    def skip(self, x: Array, source: Array, train: bool) -> Array:
        """Returns x where the branch keeps its shape, else the shortcut taken from `source`."""
        if not self.transition:
            return x
        if not hasattr(self, "downsample"):
            return pad_shortcut(source, self.shortcut.features, self.shortcut.stride)
        return self.downsample_norm(self.downsample(source), use_running_average=not train)


class NormalizedBlock(Block):
    """relu(skip(x) + norm(conv(... relu(norm(conv(x)))))) (He et al. 2015)."""

    def __call__(self, x: Array, train: bool = True) -> Array:
        """Returns the block's output, [batch, height, width, channels]."""
        out = x
        for i in range(1, self.m):
            out = nnx.relu(self.norm(self.conv(out, i), i, train))
        out = self.norm(self.conv(out, self.m), self.m, train)
        return nnx.relu(out + self.skip(x, x, train))


class PreactivationBlock(Block):
    """skip(x) + conv(relu(norm(... conv(relu(norm(x)))))) (He et al. 2016, Fig. 1b)."""

    preactivation = True

    def __call__(self, x: Array, train: bool = True) -> Array:
        """Returns the block's output, [batch, height, width, channels]."""
        out = source = nnx.relu(self.norm(x, 1, train))
        for i in range(1, self.m):
            out = nnx.relu(self.norm(self.conv(out, i), i + 1, train))
        return self.conv(out, self.m) + self.skip(x, source, train)


class ResNet(nnx.Module):
    """Residual network on NHWC images; `fixup_init.models.ResNet` says what the options mean.

    Args:
      stage_sizes: Number of blocks of each stage.
      block: "basic" or "bottleneck".
      num_classes: Number of logits.
      width: Channels of the stem, and of the first stage's 3x3 convolutions.
      stem: "cifar" or "imagenet".
      norm: "batch" or "none".
      preactivation: Norm and relu before each convolution in place of after it.
      shortcut: "projection" or "pad".
      in_channels: Channels of the images.
      rngs: Source of the parameters.

    Raises:
      ValueError: If an option is unknown or the input is not [batch, height, width, channels].
    """

    def __init__(
        self,
        stage_sizes: tuple[int, ...],
        block: str = "basic",
        num_classes: int = 10,
        width: int = 16,
        stem: str = "cifar",
        norm: str = "batch",
        preactivation: bool = False,
        shortcut: str = "projection",
        in_channels: int = 3,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        check_option("block", block, BRANCHES)
        check_option("stem", stem, STEMS)
        check_option("norm", norm, NORMS)
        check_option("shortcut", shortcut, SHORTCUTS)
        self.stem, self.preactivation = stem, preactivation
        self.block_names = tuple(f"layer{s + 1}_{i}" for s, size in enumerate(stage_sizes) for i in range(size))
        block_type = PreactivationBlock if preactivation else NormalizedBlock

        size, stride = STEMS[stem]
        self.conv1 = make_conv(in_channels, Layer(size, width, stride), rngs)
        channels = width
        for name in self.block_names:
            stage, i = (int(part) for part in name.removeprefix("layer").split("_"))
            layers = BRANCHES[block](width * 2 ** (stage - 1), 2 if stage > 1 and i == 0 else 1)
            setattr(self, name, block_type(channels, layers, NORMS[norm], shortcut, rngs))
            channels = layers[-1].features
        self.norm = NORMS[norm](channels if preactivation else width, rngs=rngs)
        self.fc = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: Array, train: bool = True) -> Float[Array, "batch classes"]:
        """Returns the logits.

        Args:
          x: Images, [batch, height, width, channels].
          train: Use the batch's own statistics in batch norm and update the running ones.

        Returns:
          Logits, [batch, num_classes].
        """
        check_images(x.shape)
        x = self.conv1(x)
        if not self.preactivation:
            x = nnx.relu(self.norm(x, use_running_average=not train))
        if self.stem == "imagenet":
            x = max_pool(x)
        for name in self.block_names:
            x = getattr(self, name)(x, train)
        if self.preactivation:
            x = nnx.relu(self.norm(x, use_running_average=not train))
        return self.fc(jnp.mean(x, axis=(1, 2)))


def cifar_resnet(depth: int, norm: str = "batch", *, rngs: nnx.Rngs, **kwargs: Any) -> ResNet:
    """Returns the NNX form of `fixup_init.models.cifar_resnet`.

    Args:
      depth: 6n + 2: 8, 14, 20, 26, 32, ...
      norm: "batch" or "none".
      rngs: Source of the parameters.
      **kwargs: Other arguments of `ResNet`.

    Returns:
      The module; images [batch, height, width, channels] to logits [batch, num_classes].

    Raises:
      ValueError: If the depth is not 6n + 2, or an option is unknown.

    >>> model = nnx.eval_shape(lambda: cifar_resnet(20, rngs=nnx.Rngs(0)))
    >>> model.layer2_0.conv1.kernel.shape
    (3, 3, 16, 32)

    References:
      He et al. 2015, arXiv:1512.03385, Sec. 4.2.
    """
    return ResNet(cifar_stages(depth), norm=norm, rngs=rngs, **{"shortcut": "pad", **kwargs})


def imagenet_resnet(depth: int, norm: str = "batch", *, rngs: nnx.Rngs, **kwargs: Any) -> ResNet:
    """Returns the NNX form of `fixup_init.models.imagenet_resnet`.

    Args:
      depth: 18, 34, 50, 101 or 152.
      norm: "batch" or "none".
      rngs: Source of the parameters.
      **kwargs: Other arguments of `ResNet`.

    Returns:
      The module; images [batch, height, width, channels] to logits [batch, num_classes].

    Raises:
      ValueError: If the depth is none of these, or an option is unknown.

    >>> model = nnx.eval_shape(lambda: imagenet_resnet(50, rngs=nnx.Rngs(0)))
    >>> model.layer1_0.downsample.kernel.shape
    (1, 1, 64, 256)

    References:
      He et al. 2015, arXiv:1512.03385, Table 1.
    """
    block, stages = imagenet_stages(depth)
    defaults = {"num_classes": 1000, "width": 64, "stem": "imagenet"}
    return ResNet(stages, block, norm=norm, rngs=rngs, **{**defaults, **kwargs})
