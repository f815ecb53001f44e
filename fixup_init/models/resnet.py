"""One Linen definition of the CIFAR and ImageNet residual networks, normalized, plain or with Fixup's scalars.

A network is stem, stages of residual blocks, head. A block is `skip + branch`, and a branch is a chain of m
convolutions (`Layer`): two for "basic", three for "bottleneck". Four small classes say what stands around them:

| | after the sum (2015) | before the convolution (2016) |
|---|---|---|
| normalization or none | `NormalizedBlock` | `PreactivationBlock` |
| Fixup's scalars | `FixupBlock` | `FixupPreactivationBlock` |

Parameters are named as in the Fixup authors' code, `layer1.0` becoming `layer1_0`: `conv1/kernel`, `layer1_0/bias1a`,
`layer1_0/conv1/kernel`, `layer1_0/scale`, `layer2_0/downsample/kernel`, `fc/bias`.

References:
  He et al. 2015, Deep Residual Learning (arXiv:1512.03385); He et al. 2016, Identity Mappings (arXiv:1603.05027);
  Zhang, Dauphin & Ma 2019, Fixup Initialization (arXiv:1901.09321), Sec. 4.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Layer(NamedTuple):
    """One convolution: a `size` x `size` kernel without bias, padded alike on both sides by `size // 2`."""

    size: int
    features: int
    stride: int = 1


def basic_branch(width: int, stride: int) -> tuple[Layer, ...]:
    """Two 3x3 convolutions, the first with the stride (He et al. 2015, Fig. 5 left)."""
    return Layer(3, width, stride), Layer(3, width)


def bottleneck_branch(width: int, stride: int) -> tuple[Layer, ...]:
    """1x1, 3x3 with the stride, 1x1 to four times the width (He et al. 2015, Fig. 5 right)."""
    return Layer(1, width), Layer(3, width, stride), Layer(1, 4 * width)


BRANCHES = {"basic": basic_branch, "bottleneck": bottleneck_branch}
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # kernel size, stride; "imagenet" also pools
SHORTCUTS = ("projection", "pad")
IMAGENET_STAGES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def batch_norm(x: Array, name: str, train: bool, dtype: Any) -> Array:
    """Normalizes each channel over batch and positions."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)(x)


def group_norm(x: Array, name: str, train: bool, dtype: Any) -> Array:
    """Normalizes 32 groups of channels as Wu & He 2018 do, or fewer, so that a group has two channels at least."""
    del train
    groups = math.gcd(32, max(1, x.shape[-1] // 2))
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)(x)


def instance_norm(x: Array, name: str, train: bool, dtype: Any) -> Array:
    """Normalizes each channel of each example over positions."""
    del train
    return nn.InstanceNorm(epsilon=1e-5, dtype=dtype, name=name)(x)


def layer_norm(x: Array, name: str, train: bool, dtype: Any) -> Array:
    """Normalizes each example over positions and channels, with a scale and a bias for each channel."""
    del train
    return nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=-1, dtype=dtype, name=name)(x)


def no_norm(x: Array, name: str = "", train: bool = False, dtype: Any = None) -> Array:
    """Returns x."""
    del name, train, dtype
    return x


NORMS: dict[str, Callable[..., Array]] = {
    "batch": batch_norm,
    "group": group_norm,
    "instance": instance_norm,
    "layer": layer_norm,
    "none": no_norm,
    "fixup": no_norm,  # its scalars are in FixupBlock, FixupPreactivationBlock and ResNet
}


def convolve(x: Array, layer: Layer, name: str, dtype: Any) -> Array:
    """Applies the convolution `layer`, a submodule called `name`."""
    return nn.Conv(
        layer.features,
        (layer.size, layer.size),
        strides=layer.stride,
        padding=layer.size // 2,  # PyTorch's; "SAME" starts one pixel later at stride 2
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal,
        name=name,
    )(x)


def max_pool(x: Array) -> Array:
    """The 3x3 max pooling with stride 2 of the ImageNet stem."""
    # Flax annotates `padding` as a string and takes both forms.
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


def pad_shortcut(x: Array, features: int, stride: int) -> Array:
    """Keeps every `stride`-th position and appends zero channels (He et al. 2015, option A): no parameters."""
    x = nn.avg_pool(x, (1, 1), strides=(stride, stride))
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], features - x.shape[-1]), x.dtype)], axis=-1)


def scalar(module: nn.Module, name: str, dtype: Any, init: Callable[..., Array] = nn.initializers.zeros) -> Array:
    """Returns one of Fixup's scalars, a parameter of shape (1,) of `module`."""
    return jnp.asarray(module.param(name, init, (1,), jnp.float32), dtype).squeeze()


def is_transition(channels: int, layers: tuple[Layer, ...]) -> bool:
    """Says whether the branch `layers` changes the shape of an input with so many channels."""
    return channels != layers[-1].features or any(layer.stride != 1 for layer in layers)


class Block(nn.Module):
    """What the four residual blocks share: the convolutions of the branch and the way around it.

    Attributes:
      layers: The m convolutions of the branch, in order.
      norm: `norm(x, name=...)`, used by the blocks without Fixup's scalars.
      shortcut: "projection" or "pad", where the branch changes the shape.
      dtype: Dtype of the computation.
    """

    layers: tuple[Layer, ...]
    norm: Callable[..., Array] = no_norm
    shortcut: str = "projection"
    dtype: Any = None

    @nn.nowrap
    def conv(self, x: Array, i: int) -> Array:
        """The i-th convolution of the branch, counted from 1."""
        return convolve(x, self.layers[i - 1], f"conv{i}", self.dtype)

    @nn.nowrap
    def skip(self, x: Array, source: Array, norm: Callable[..., Array] = no_norm) -> Array:
        """Returns x where the branch keeps its shape, else the shortcut taken from `source`."""
        if not is_transition(x.shape[-1], self.layers):
            return x
        shortcut = Layer(1, self.layers[-1].features, math.prod(layer.stride for layer in self.layers))
        if self.shortcut == "pad":
            return pad_shortcut(source, shortcut.features, shortcut.stride)
        return norm(convolve(source, shortcut, "downsample", self.dtype), name="downsample_norm")


class NormalizedBlock(Block):
    """relu(skip(x) + norm(conv(... relu(norm(conv(x)))))) (He et al. 2015)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m, out = len(self.layers), x
        for i in range(1, m):
            out = nn.relu(self.norm(self.conv(out, i), name=f"norm{i}"))
        out = self.norm(self.conv(out, m), name=f"norm{m}")
        return nn.relu(out + self.skip(x, x, self.norm))


class PreactivationBlock(Block):
    """skip(x) + conv(relu(norm(... conv(relu(norm(x)))))) (He et al. 2016, Fig. 1b)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m = len(self.layers)
        out = source = nn.relu(self.norm(x, name="norm1"))
        for i in range(1, m):
            out = nn.relu(self.norm(self.conv(out, i), name=f"norm{i + 1}"))
        return self.conv(out, m) + self.skip(x, source)


class FixupBlock(Block):
    """relu(skip(x) + scale * conv(...) + bias), a scalar bias before each convolution and each relu of the branch.

    An identity skip takes x, a shortcut x + bias1a, as in the authors' code.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m, bias = len(self.layers), partial(scalar, self, dtype=self.dtype)
        out = source = x + bias("bias1a")
        for i in range(1, m):
            out = nn.relu(self.conv(out, i) + bias(f"bias{i}b")) + bias(f"bias{i + 1}a")
        scale = scalar(self, "scale", self.dtype, nn.initializers.ones)
        out = self.conv(out, m) * scale + bias(f"bias{m}b")
        return nn.relu(out + self.skip(x, source))


class FixupPreactivationBlock(Block):
    """skip(x) + scale * conv(...): Fixup's rule 3 (Zhang et al. 2019, Sec. 3) applied to the block of 2016.

    `bias{i}a` stands before the relu, `bias{i}b` before the convolution. The authors' code has no such block.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m, bias = len(self.layers), partial(scalar, self, dtype=self.dtype)
        out = source = nn.relu(x + bias("bias1a")) + bias("bias1b")
        for i in range(1, m):
            out = nn.relu(self.conv(out, i) + bias(f"bias{i + 1}a")) + bias(f"bias{i + 1}b")
        scale = scalar(self, "scale", self.dtype, nn.initializers.ones)
        return self.conv(out, m) * scale + self.skip(x, source)


BLOCKS: dict[tuple[bool, bool], type[Block]] = {  # (norm == "fixup", preactivation)
    (False, False): NormalizedBlock,
    (False, True): PreactivationBlock,
    (True, False): FixupBlock,
    (True, True): FixupPreactivationBlock,
}


def check_option(field: str, value: str, valid: Collection[str]) -> None:
    """Raises a ValueError that names the field, its value and the valid ones."""
    if value not in valid:
        raise ValueError(f"ResNet got {field}={value!r}; choose one of {', '.join(map(repr, valid))}.")


def check_images(shape: tuple[int, ...]) -> None:
    """Raises a ValueError where the shape is not that of a batch of images."""
    if len(shape) != 4:
        raise ValueError(
            f"ResNet got an input of shape {tuple(shape)}; expected [batch, height, width, channels]. "
            "Give a single image a batch axis with x[None]."
        )


class ResNet(nn.Module):
    """Residual network on NHWC images with any number of channels.

    Stage s = 0, 1, ... has `stage_sizes[s]` blocks of width `width * 2**s`; the first block of every stage but the
    first halves the resolution. The number of residual branches is L = sum(stage_sizes). Post-activation networks
    normalize after the stem, preactivation ones before pooling. The modules' own initializers are He fan_out for
    convolutions, LeCun for the head, zero for biases, one for multipliers; `fixup_init.init` gives Fixup's.

    Attributes:
      stage_sizes: Number of blocks of each stage.
      block: "basic" (m = 2) or "bottleneck" (m = 3).
      num_classes: Number of logits.
      width: Channels of the stem, and of the first stage's 3x3 convolutions.
      stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, then 3x3 max pooling with stride 2).
      norm: "batch", "group", "instance", "layer", "none", or "fixup" (no normalization, the authors' scalars).
      preactivation: Norm and relu before each convolution (He et al. 2016) in place of after it.
      shortcut: Where a block changes the shape: "projection" (1x1 convolution) or "pad" (stride and zero channels).
      dtype: Dtype of the computation; parameters are float32.
      remat: Recompute each block in the backward pass.
      scan: Run the equal blocks of a stage as one `nn.scan`; their parameters are stacked in `layer{s}_stack`.

    Raises:
      ValueError: If an option is unknown or the input is not [batch, height, width, channels].
    """

    stage_sizes: tuple[int, ...]
    block: str = "basic"
    num_classes: int = 10
    width: int = 16
    stem: str = "cifar"
    norm: str = "batch"
    preactivation: bool = False
    shortcut: str = "projection"
    dtype: Any = None
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        check_option("block", self.block, BRANCHES)
        check_option("stem", self.stem, STEMS)
        check_option("norm", self.norm, NORMS)
        check_option("shortcut", self.shortcut, SHORTCUTS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Float[Array, "batch classes"]:
        """Returns the logits.

        Args:
          x: Images, [batch, height, width, channels].
          train: Use the batch's own statistics in batch norm and update the running ones; no effect on other networks.

        Returns:
          Logits, [batch, num_classes].
        """
        check_images(x.shape)
        norm = partial(NORMS[self.norm], train=train, dtype=self.dtype)
        size, stride = STEMS[self.stem]
        x = convolve(x, Layer(size, self.width, stride), "conv1", self.dtype)
        if not self.preactivation:
            x = self.rectify(norm(x, name="norm"))
        if self.stem == "imagenet":
            x = max_pool(x)
        for stage in range(len(self.stage_sizes)):
            x = self.run_stage(x, stage, norm)
        if self.preactivation:
            x = self.rectify(norm(x, name="norm"))
        x = jnp.mean(x, axis=(1, 2))
        if self.norm == "fixup":
            x = x + scalar(self, "bias2", self.dtype)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)

    @nn.nowrap
    def rectify(self, x: Array) -> Array:
        """The relu outside of the blocks, after a scalar bias in Fixup."""
        return nn.relu(x + scalar(self, "bias1", self.dtype) if self.norm == "fixup" else x)

    @nn.nowrap
    def run_stage(self, x: Array, stage: int, norm: Callable[..., Array]) -> Array:
        """Runs the blocks of a stage, one by one or, with `scan`, the equal ones stacked."""
        block_type = BLOCKS[self.norm == "fixup", self.preactivation]
        block_type = nn.remat(block_type) if self.remat else block_type
        size, width, name = self.stage_sizes[stage], self.width * 2**stage, f"layer{stage + 1}"
        branches = [BRANCHES[self.block](width, 2 if stage > 0 and i == 0 else 1) for i in range(size)]
        block = partial(block_type, norm=norm, shortcut=self.shortcut, dtype=self.dtype)
        unrolled = int(is_transition(x.shape[-1], branches[0])) if self.scan else size
        for i in range(unrolled):
            x = block(branches[i], name=f"{name}_{i}")(x)
        if unrolled < size:
            x = scan_blocks(block(branches[-1], name=f"{name}_stack"), x, size - unrolled)
        return x


def scan_blocks(block: Block, x: Array, length: int) -> Array:
    """Applies `length` copies of `block` one after the other; each variable has the copies along its first axis."""

    def step(block: Block, x: Array, _: None) -> tuple[Array, None]:
        return block(x), None

    return nn.scan(step, variable_axes={True: 0}, split_rngs={True: True}, length=length)(block, x, None)[0]


def cifar_stages(depth: int) -> tuple[int, ...]:
    """Returns the three stage sizes (n, n, n) of the CIFAR network with 6n + 2 layers."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        nearest = " and ".join(map(str, sorted({max(8, 6 * n + 2), max(8, 6 * n + 8)})))
        raise ValueError(f"A CIFAR ResNet has depth 6n + 2, n >= 1, got {depth}; nearest valid: {nearest}.")
    return (n, n, n)


def imagenet_stages(depth: int) -> tuple[str, tuple[int, ...]]:
    """Returns the kind of block and the stage sizes of the ImageNet network with so many layers."""
    if depth not in IMAGENET_STAGES:
        valid = ", ".join(map(str, IMAGENET_STAGES))
        raise ValueError(
            f"An ImageNet ResNet has depth {valid}, got {depth}; build others with ResNet(stage_sizes=...)."
        )
    return IMAGENET_STAGES[depth]


def cifar_resnet(depth: int, norm: str = "batch", **kwargs: Any) -> ResNet:
    """Returns the CIFAR ResNet of so many layers: three stages of n basic blocks, depth = 6n + 2, widths 16, 32, 64.

    Shortcuts have no parameters, as in the paper (`shortcut="pad"`). `norm="fixup"` is the Fixup authors' network.

    Args:
      depth: 6n + 2: 8, 14, 20, 26, 32, ...
      norm: "batch", "group", "instance", "layer", "none" or "fixup".
      **kwargs: Other fields of `ResNet`.

    Returns:
      The module; images [batch, height, width, channels] to logits [batch, num_classes].

    Raises:
      ValueError: If the depth is not 6n + 2, or an option is unknown.

    >>> import jax
    >>> model = cifar_resnet(20, norm="fixup")
    >>> model.stage_sizes
    (3, 3, 3)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    268393

    References:
      He et al. 2015, arXiv:1512.03385, Sec. 4.2; Zhang, Dauphin & Ma 2019, arXiv:1901.09321, Sec. 4.
    """
    return ResNet(cifar_stages(depth), norm=norm, **{"shortcut": "pad", **kwargs})


def imagenet_resnet(depth: int, norm: str = "batch", **kwargs: Any) -> ResNet:
    """Returns the ImageNet ResNet of so many layers: four stages, widths 64 to 512, projection shortcuts.

    The stride of a bottleneck is in its 3x3 convolution. `norm="fixup"` is the Fixup authors' network.

    Args:
      depth: 18 or 34 (basic blocks); 50, 101 or 152 (bottlenecks).
      norm: "batch", "group", "instance", "layer", "none" or "fixup".
      **kwargs: Other fields of `ResNet`.

    Returns:
      The module; images [batch, height, width, channels] to logits [batch, num_classes], 1,000 classes by default.

    Raises:
      ValueError: If the depth is none of these, or an option is unknown.

    >>> model = imagenet_resnet(50)
    >>> model.block, model.stage_sizes
    ('bottleneck', (3, 4, 6, 3))

    References:
      He et al. 2015, arXiv:1512.03385, Table 1; Zhang, Dauphin & Ma 2019, arXiv:1901.09321, Sec. 4.
    """
    block, stage_sizes = imagenet_stages(depth)
    return ResNet(stage_sizes, block, norm=norm, **{"num_classes": 1000, "width": 64, "stem": "imagenet", **kwargs})
