"""Backbones trained by `dnc train` or elsewhere, with a report of what was loaded.

Paper: the classifier has no weights, so all that was learnt on ImageNet moves to segmentation.
Sub-centroids are those of the new data's classes and start anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import Tensor, nn

from dnc.mmseg import checkpoints
from dnc.mmseg.segmentors import Loaded, load_into
from shared_utils.checkpoint import load_weights
from shared_utils.errors import InputError

PREFIXES = ("", "backbone.", "encoder.", "module.", "model.", "encoder.network.", "encoder.model.")


@HOOKS.register_module()
class BackboneHook(Hook):
    """Starts a backbone from a run of `dnc train` or a checkpoint, instead of `pretrained`.

    `custom_hooks = [dict(type="BackboneHook", checkpoint="runs/dnc/imagenet-swin")]`
    """

    priority = "VERY_HIGH"

    def __init__(self, checkpoint: str, trusted: bool = False) -> None:
        """Take a run folder, a `.safetensors` file or a checkpoint of torch or mmengine."""
        self.checkpoint, self.trusted = Path(checkpoint), trusted

    def before_run(self, runner: Any) -> None:
        """Load, before anything that was saved of the segmentor itself.

        Raises: MissingFileError; InputError where no weight fits.
        """
        model = getattr(runner.model, "module", runner.model)
        if runner._train_loop is not None:
            report = load_backbone(model.backbone, self.checkpoint, trusted=self.trusted)
            print_log(f"backbone from {self.checkpoint}: {report}", "current")


def load_backbone(backbone: nn.Module, path: Path, *, trusted: bool = False) -> Loaded:
    """Load ImageNet weights into a backbone of mmseg; sub-centroids and classifiers stay behind.

    Weights of timm's and torchvision's ResNets fit mmseg's `ResNet`; those of timm's Swin are
    renamed, and the columns of its patch merging put into mmseg's order.

    Args:
        backbone: changed in place.
        path: see `BackboneHook`.
        trusted: open a file that is more than tensors and plain data.

    Returns: the names, of the backbone.
    Raises: MissingFileError; InputError where no weight fits.
    """
    weights = _read(path, trusted)
    own = backbone.state_dict()
    tried = [_renamed(weights, prefix) for prefix in PREFIXES]
    best = max(tried, key=lambda names: sum(_fits(own, name, names[name]) for name in names))
    report = load_into(backbone, best)
    if not any(not name.endswith("num_batches_tracked") for name in report.loaded):
        first = ", ".join(list(weights)[:3])
        raise InputError(
            str(path),
            f"no weight of this backbone ({len(weights)} tensors: {first}, ...)",
            f"such as {next(iter(own))}",
            "give weights of the same network",
        )
    return report


def _read(path: Path, trusted: bool) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return dict(load_weights(path)[0])
    return checkpoints.state_dict_of(checkpoints.load(path, trusted=trusted))


def _fits(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name in own and own[name].shape == tensor.shape


def _renamed(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those below a prefix, without it; of Swin under mmseg's names."""
    found = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    if not any(name.startswith("layers.0.blocks.0.attn") for name in found):
        return found
    return dict(_swin(name, tensor) for name, tensor in found.items())


def _swin(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """One tensor of timm's Swin for mmseg's."""
    words = name.split(".")
    if words[0] == "layers" and words[2] == "downsample":
        # timm merges patches before a stage, mmseg after the one before it.
        words[:2] = ["stages", str(int(words[1]) - 1)]
        return ".".join(words), _merged_as_unfolded(tensor)
    name = ".".join(words)
    for old, new in (
        ("layers.", "stages."),
        (".attn.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        ("patch_embed.proj.", "patch_embed.projection."),
    ):
        name = name.replace(old, new, 1) if old in name else name
    return name, tensor


def _merged_as_unfolded(tensor: Tensor) -> Tensor:
    """(..., 4 C): neighbours (row, column) 00 10 01 11, each C -> channels, each 00 01 10 11."""
    four = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    unfolded: Tensor = four.transpose(-1, -2).flatten(-2)
    return unfolded
