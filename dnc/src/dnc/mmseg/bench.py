"""What sub-centroids cost in a segmentor, against the softmax classifier in the same decoder."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dnc.bench import STATUS, Row, peak_of_process, print_peak, race
from dnc.mmseg.owners import centroid_heads

NUM_CLASSES, SIDE = 150, 512
NORM = {"type": "BN", "requires_grad": True}
RESNET = {
    "type": "ResNetV1c", "depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3),
    "norm_cfg": NORM, "contract_dilation": True,
}  # fmt: skip
MODELS_OF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FCN-R50": (
        {"dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1)},
        {"type": "FCNHead", "in_channels": 2048, "in_index": 3, "num_convs": 2},
    ),
    "UPerNet-R50": (
        {"dilations": (1, 1, 1, 1), "strides": (1, 2, 2, 2)},
        {"type": "UPerHead", "in_channels": [256, 512, 1024, 2048], "in_index": [0, 1, 2, 3]},
    ),
}


def build(name: str, kind: str, device: torch.device) -> Any:
    """A model of `MODELS_OF` with 150 classes, its classifier `dnc` or `softmax`."""
    torch.manual_seed(0)
    init_default_scope("mmseg")
    backbone, head = MODELS_OF[name]
    own = {"type": f"DNC{head['type']}"} if kind == "dnc" else {}
    common = {"channels": 512, "num_classes": NUM_CLASSES, "norm_cfg": NORM}
    config = ConfigDict(
        type="EncoderDecoder",
        data_preprocessor={"type": "SegDataPreProcessor"},
        backbone=RESNET | backbone,
        decode_head=head | common | own,
        train_cfg={},
        test_cfg={"mode": "whole"},
    )
    return MODELS.build(config).to(device).train()


def batch_of(count: int, device: torch.device) -> tuple[Tensor, list[Any]]:
    """Random images, and labels in squares of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator).to(device)
    squares = torch.randint(NUM_CLASSES, (count, SIDE // 32, SIDE // 32), generator=generator)
    labels = squares.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)
    meta = {"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE), "pad_shape": (SIDE, SIDE)}
    samples = []
    for one in labels:
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=one[None])
        samples.append(sample)
    return images, samples


def train_step(model: Any, images: Tensor, samples: list[Any]) -> Callable[[], None]:
    """A whole step: loss, backward, SGD, sub-centroids."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _, head in centroid_heads(model):
        head.is_hooked = True

    def step() -> None:
        losses = model.loss(images, samples)
        optimizer.zero_grad()
        losses["decode.loss_ce"].backward()
        optimizer.step()
        for _, head in centroid_heads(model):
            head.classifier.update()

    return step


def inference(model: Any, images: Tensor, samples: list[Any]) -> Callable[[], None]:
    """Predictions of whole images, in eval mode."""

    def step() -> None:
        model.eval()
        with torch.no_grad():
            model.predict(images, samples)
        model.train()

    return step


def head_macs(kind: str, stride: int) -> float:
    """Multiply-adds of a classifier's forward pass at 512 x 512, 512 channels, in units of 1e9."""
    from dnc.classifier import NearestCentroidHead

    side = SIDE // stride
    features = torch.randn(1, 512, side, side)
    if kind == "dnc":
        layer: Any = NearestCentroidHead(NUM_CLASSES, 512, 10, memory="batch", memory_size=0)
    else:
        layer = torch.nn.Conv2d(512, NUM_CLASSES, 1)
    counter: Any = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        layer(features)
    return float(counter.get_total_flops()) / 2e9


def peak_memory(kind: str, count: int, device: torch.device) -> int:
    """Peak bytes of three train steps of FCN; on a CPU in a process of its own."""
    if device.type != "cuda":
        return peak_of_process("dnc.mmseg.bench", kind, str(count))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _three_steps(kind, count, device)
    return torch.cuda.max_memory_allocated()


def _three_steps(kind: str, count: int, device: torch.device) -> None:
    step = train_step(build("FCN-R50", kind, device), *batch_of(count, device))
    for _ in range(3):
        step()


def seg_rows(repeats: int, device: torch.device) -> list[Row]:
    """All rows that this machine can measure."""
    count = 8 if device.type == "cuda" else 1
    rows: list[Row] = []
    images, samples = batch_of(count, device)
    for name, target in (("FCN-R50", 1.02), ("UPerNet-R50", 1.05)):
        models = {kind: build(name, kind, device) for kind in ("dnc", "softmax")}
        what = f"{name}, {SIDE} px, {NUM_CLASSES} classes, K 10, batch {count}, fp32"
        tasks = [("inference", inference, target)]
        if name == "FCN-R50":
            tasks.insert(0, ("train step", train_step, 1.05))
        for task, make, most in tasks:
            sides = {kind: make(model, images, samples) for kind, model in models.items()}
            seconds = race(sides, repeats, device)
            told = f"dnc {seconds['dnc']:.3f} s, softmax {seconds['softmax']:.3f} s; {what}"
            ratio = seconds["dnc"] / seconds["softmax"]
            rows.append(Row(f"{name} {task}: dnc / softmax", ratio, "ratio", most, "lower", told))
    if device.type == "cuda" or STATUS.is_file():
        peaks = {kind: peak_memory(kind, count, device) for kind in ("dnc", "softmax")}
        what = f"FCN-R50, {SIDE} px, {NUM_CLASSES} classes, K 10, batch {count}, fp32"
        more = (peaks["dnc"] - peaks["softmax"]) / 2**30
        told = f"{peaks['dnc'] / 2**30:.2f} GiB, {peaks['softmax'] / 2**30:.2f} GiB; {what}"
        name = "FCN-R50 peak memory of a train step: dnc more than softmax"
        rows.append(Row(name, more, "GiB", None, "lower", told))
    for stride, exact in ((8, 2.831), (4, 11.325)):
        more = head_macs("dnc", stride) - head_macs("softmax", stride)
        told = f"{exact} without the padding of products to whole blocks; 512 px, 512 channels"
        name = f"multiply-adds of the scores over softmax, stride {stride}"
        rows.append(Row(name, more, "1e9", round(1.03 * exact, 3), "lower", told))
    return rows


if __name__ == "__main__":  # a side of `peak_memory`
    print_peak(lambda: _three_steps(sys.argv[1], int(sys.argv[2]), torch.device("cpu")))
