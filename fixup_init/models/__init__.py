"""The reference networks that examples and tests share; their NNX twins are in `fixup_init.models.resnet_nnx`."""

from fixup_init.models.resnet import ResNet, cifar_resnet, imagenet_resnet

__all__ = ["ResNet", "cifar_resnet", "imagenet_resnet"]
