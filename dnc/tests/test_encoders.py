"""Networks without their heads: the parameter counts of published models, stems, widths, errors."""

from typing import Any

import pytest
import torch
from torch import nn

from dnc.classifier import NearestCentroidHead
from dnc.encoders import Encoder, build_encoder, check_encoder
from shared_utils.errors import InputError


@pytest.mark.parametrize(
    ("name", "stem", "num_classes", "total"),
    [
        # Totals without a classifier: those with a linear layer less D C + C.
        ("resnet50", "imagenet", 1000, 23_508_032),
        ("resnet101", "imagenet", 1000, 42_500_160),
        ("torchvision/resnet50", "imagenet", 1000, 23_508_032),
        ("swin_small_patch4_window7_224", "imagenet", 1000, 48_837_258),
        ("swin_base_patch4_window7_224", "imagenet", 1000, 86_743_224),
        ("torchvision/swin_s", "imagenet", 1000, 48_837_258),
        ("resnet50", "cifar", 10, 23_500_352),
        ("resnet101", "cifar", 10, 42_492_480),
        ("torchvision/resnet50", "cifar", 100, 23_500_352),
    ],
)
def test_totals_of_the_specification(name: str, stem: Any, num_classes: int, total: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, stem=stem)
        head = NearestCentroidHead(num_classes, encoder.embed_dim, memory_size=0)
    assert sum(p.numel() for p in head.parameters()) == 0
    assert sum(p.numel() for p in nn.ModuleList([encoder, head]).parameters()) == total


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("torchvision/resnet18", 512),
        ("torchvision/mobilenet_v2", 1280),
        ("mobilenetv2_100", 1280),
        ("torchvision/swin_t", 768),
    ],
)
def test_features_are_pooled(name: str, width: int) -> None:
    encoder = build_encoder(name, img_size=64).eval()
    assert encoder.embed_dim == width
    assert check_encoder(encoder, torch.zeros(1, 3, 64, 64)) == width


@pytest.mark.parametrize(
    ("name", "channels", "kernel"),
    [
        ("resnet18", 64, (7, 7)),
        ("torchvision/resnet18", 64, (7, 7)),
        ("resnet18d", 64, (3, 3)),  # a stem of three convolutions
        ("resnet10t", 64, (3, 3)),
        ("resnetaa34d", 64, (3, 3)),  # its pooling is an average
        ("resnetblur18", 64, (7, 7)),  # its pooling is a Sequential
    ],
)
def test_a_small_stem_keeps_the_resolution(
    name: str, channels: int, kernel: tuple[int, int]
) -> None:
    network: Any = build_encoder(name, img_size=32).network
    act = network.act1 if hasattr(network, "act1") else network.relu
    x = network.maxpool(act(network.bn1(network.conv1(torch.zeros(1, 3, 32, 32)))))
    assert x.shape == (1, channels, 32, 32)
    big: Any = build_encoder(name, img_size=64).network
    first = big.conv1[0] if isinstance(big.conv1, nn.Sequential) else big.conv1
    assert first.kernel_size == kernel
    assert first.stride == (2, 2)


def test_a_small_image_leaves_what_is_no_resnet_alone() -> None:
    network: Any = build_encoder("resnetv2_50", img_size=32).network
    assert network.stem.conv.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "is_last"), [("resnet18", True), ("swin_tiny_patch4_window7_224", False)]
)
def test_convolutions_alone_have_their_channels_last(name: str, is_last: bool) -> None:
    network: Any = build_encoder(name, img_size=64 if is_last else 224).network
    weight = network.layer1[0].conv1.weight if is_last else network.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == is_last


def test_a_norm_belongs_to_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", img_size=32, embed_norm=True).eval()
    features = encoder(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
    assert encoder.norm.weight.shape == (512,)


@pytest.mark.parametrize(
    ("name", "stem", "message"),
    [
        ("resnet81", "auto", r"^model\.encoder: got resnet81, expected a timm name; "),
        (
            "torchvision/resnet81",
            "auto",
            r"^model\.encoder: got torchvision/resnet81, expected one ",
        ),
        ("torchvision/inception_v3", "auto", None),
        ("swin_tiny_patch4_window7_224", "cifar", r"^model\.stem: got cifar for swin_tiny"),
    ],
)
def test_what_cannot_be_built(name: str, stem: Any, message: str | None) -> None:
    if message is None:
        assert build_encoder(name, img_size=299).embed_dim == 2048
        return
    with pytest.raises(InputError, match=message):
        build_encoder(name, stem=stem)


class _Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> Any:
        return images


class _Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> Any:
        return images, images


@pytest.mark.parametrize(
    ("encoder", "got"), [(_Maps(), r"\(1, 3, 8, 8\)"), (_Pair(), "tuple")], ids=["maps", "pair"]
)
def test_an_encoder_that_gives_no_vectors(encoder: nn.Module, got: str) -> None:
    match = rf"^encoder: got output {got} for one image, expected \(1, D\); pool it"
    with pytest.raises(InputError, match=match):
        check_encoder(encoder, torch.zeros(1, 3, 8, 8))


def test_checking_leaves_the_mode() -> None:
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 4).train()
    check_encoder(encoder, torch.zeros(1, 3, 2, 2))
    assert encoder.training
