"""DeepLabV3 with ResNet-101 on COCO-Stuff 10k, softmax: the twin of deeplabv3_r101_cocostuff10k.py.

Paper: the DeepLabV3 row with ResNet-101 of its table on COCO-Stuff 10k.
Trains: batch 16, 160k iterations, crop 512; meant for 4 GPUs, 4 images each.
Command: dnc seg train dnc/configs/deeplabv3_r101_cocostuff10k_softmax.py --launcher pytorch
Cost: not measured by us. Expected: no published figure known to us.
"""

_base_ = [
    "mmseg::_base_/models/deeplabv3_r50-d8.py",
    "mmseg::_base_/datasets/coco-stuff10k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
    "./_base_/dnc.py",
]

model = dict(
    pretrained="open-mmlab://resnet101_v1c",
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(depth=101),
    decode_head=dict(num_classes=171),
    auxiliary_head=dict(num_classes=171),
)
