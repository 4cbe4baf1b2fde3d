"""Tiny segmentors and crops for the tests of the plug-in."""

from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import dnc.mmseg  # noqa: F401

# Made here, or the first test that logs would tie the log to its own captured stream.
MMLogger.get_instance("tests", log_level="ERROR")
CLASSES, SIDE, WIDTH = 3, 32, 16
BACKBONE = dict(
    type="ResNetV1c", depth=18, base_channels=4, stem_channels=4, num_stages=4,
    out_indices=(0, 1, 2, 3), dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
    norm_cfg=dict(type="BN"), contract_dilation=True,
)  # fmt: skip
COMMON = dict(channels=WIDTH, num_classes=CLASSES, norm_cfg=dict(type="BN"), dropout_ratio=0.1)
LAST = dict(in_channels=32, in_index=3)
ALL = dict(in_channels=[4, 8, 16, 32], in_index=[0, 1, 2, 3])
HEADS: dict[str, dict[str, Any]] = {
    "DNCFCNHead": dict(num_convs=1, concat_input=True, **LAST),
    "DNCASPPHead": dict(dilations=(1, 2), **LAST),
    "DNCDepthwiseSeparableASPPHead": dict(
        dilations=(1, 2), c1_in_channels=4, c1_channels=4, **LAST
    ),
    "DNCUPerHead": dict(pool_scales=(1, 2), **ALL),
    "DNCSegformerHead": dict(**ALL),
}


def head_config(kind: str = "DNCFCNHead", **options: Any) -> dict[str, Any]:
    own = {} if not kind.startswith("DNC") else {"num_centroids": 2}
    return {"type": kind, **HEADS[f"DNC{kind.removeprefix('DNC')}"], **COMMON, **own, **options}


def model_config(kind: str = "DNCFCNHead", **options: Any) -> dict[str, Any]:
    return dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor", mean=[127.0] * 3, std=[64.0] * 3, size=(SIDE, SIDE)
        ),
        backbone=dict(BACKBONE),
        decode_head=head_config(kind, **options),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


def build(config: dict[str, Any]) -> Any:
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(config))
    model.init_weights()
    return model.train()


def samples(labels: Tensor) -> list[Any]:
    """(N, H, W) -> data samples."""
    found = []
    for i, one in enumerate(labels):
        size = tuple(one.shape)
        meta = dict(
            img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0), flip=False,
            img_path=f"images/{i}.jpg", seg_map_path=f"labels/{i}.png",
        )  # fmt: skip
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=one[None])
        found.append(sample)
    return found


def batch(seed: int = 0, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images whose colours say the class, and labels with an ignored corner."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, (count, 4, 4)).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    colours = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    images = colours[labels].transpose(0, 3, 1, 2) * 2 - 1
    images = torch.from_numpy(images + 0.1 * random.standard_normal(images.shape)).float()
    labels[:, :8, :8] = 255
    return images, torch.from_numpy(labels)


def step(model: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss terms, gradients in place."""
    losses = model.loss(images, samples(labels))
    model.zero_grad()
    sum(v for k, v in losses.items() if "loss" in k).backward()
    return losses


def classifier(model: Any) -> Any:
    return model.decode_head.classifier


def conv_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if "conv_seg" in key]
