"""Networks that turn images into feature vectors: timm's and torchvision's, without their heads.

The paper puts its classifier behind the pooled last stage: ResNet, Swin, MobileNetV2 (Sec. 4).
"""

from typing import Any, Literal

import timm
import torch
import torchvision
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from shared_utils.errors import InputError, near_miss

Stem = Literal["auto", "cifar", "imagenet"]
SMALL = 64  # pixels; below it a ResNet's first layers keep the resolution
TORCHVISION = "torchvision/"
TRANSFORMERS = ("swin", "vit")  # in a name; built for one size of images


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, D).

    Attributes:
        embed_dim: D.
    """

    def __init__(self, network: nn.Module, embed_dim: int, *, embed_norm: bool = False) -> None:
        """Wrap a network without a head; `embed_norm` puts a LayerNorm behind it."""
        super().__init__()
        self.network, self.embed_dim = network, embed_dim
        self.norm = nn.LayerNorm(embed_dim) if embed_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        features: Tensor = self.norm(self.network(images))
        return features


def build_encoder(
    name: str,
    *,
    img_size: int = 224,
    stem: Stem = "auto",
    pretrained: bool = False,
    embed_norm: bool = False,
) -> Encoder:
    """A network by name.

    Args:
        name: a timm name, or `torchvision/` and one of torchvision's.
        img_size: side of the images in pixels; decides an automatic stem, and the windows of
            networks that are built for one size.
        stem: of a ResNet: `cifar` is a 3x3 convolution of stride 1 and no pooling; a stem of three
            convolutions keeps them, with stride 1.
        pretrained: fetch the published weights, once, from their hub.
        embed_norm: a LayerNorm on the features.

    Raises: InputError for an unknown name, a stem that this network has not, or weights that cannot
        be fetched.
    """
    if name.startswith(TORCHVISION):
        network, embed_dim = _from_torchvision(name.removeprefix(TORCHVISION), pretrained)
    else:
        network, embed_dim = _from_timm(name, img_size, pretrained)
    if stem == "cifar" or (stem == "auto" and img_size < SMALL and _is_resnet(network)):
        _shrink_stem(network, name)
    if not _is_transformer(name):  # ResNet-50 trains 1.3 times faster so on a CPU, in bf16
        network = network.to(memory_format=torch.channels_last)
    return Encoder(network, embed_dim, embed_norm=embed_norm)


def check_encoder(encoder: nn.Module, image: Tensor) -> int:
    """The width of what an encoder gives.

    Args:
        encoder: any module.
        image: (1, 3, H, W) to try it on, on its device.

    Raises: InputError unless that is (1, D).
    """
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        features = encoder(image)
    encoder.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 1:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            "encoder", f"output {got} for one image", "(1, D)", "pool it, or leave its head out"
        )
    return features.shape[1]


def _is_resnet(network: nn.Module) -> bool:
    return isinstance(network, TimmResNet | torchvision.models.ResNet)


def _is_transformer(name: str) -> bool:
    return any(word in name for word in TRANSFORMERS)


def _from_timm(name: str, img_size: int, pretrained: bool) -> tuple[Any, int]:
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise InputError("model.encoder", name, "a timm name", near_miss(name, known))
    size: dict[str, Any] = {"img_size": img_size} if _is_transformer(name) else {}
    try:
        network: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    except (RuntimeError, OSError) as error:
        raise _no_weights(name, error) from error
    return network, int(network.num_features)


def _from_torchvision(name: str, pretrained: bool) -> tuple[Any, int]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(
            "model.encoder", TORCHVISION + name, "one of torchvision's", near_miss(name, known)
        )
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except (RuntimeError, OSError) as error:
        raise _no_weights(TORCHVISION + name, error) from error
    for head in ("fc", "classifier", "head"):
        layer = getattr(network, head, None)
        linear = layer[-1] if isinstance(layer, nn.Sequential) else layer
        if isinstance(linear, nn.Linear):
            before = list(layer)[:-1] if isinstance(layer, nn.Sequential) else []
            setattr(network, head, nn.Sequential(*before))
            return network, linear.in_features
    raise InputError(
        "model.encoder",
        f"{TORCHVISION}{name}, whose head is no linear layer",
        "a network that ends in one",
        "use timm's form of it",
    )


def _shrink_stem(network: Any, name: str) -> None:
    """Keep the resolution: stride 1 in the first layer, no pooling."""
    if not _is_resnet(network):
        raise InputError("model.stem", f"cifar for {name}", "a ResNet", "use imagenet")
    first: Any = network.conv1
    if hasattr(first, "stride"):
        network.conv1 = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:  # three convolutions, of which the first has the stride
        first[0].stride = (1, 1)
    network.maxpool = nn.Identity()


def _no_weights(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return InputError(
        "model.pretrained",
        f"no weights of {name} ({reason})",
        "weights that can be fetched",
        "train without them, or fetch them where there is a network",
    )
