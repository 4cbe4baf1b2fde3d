"""DeepLabV3+ with ResNet-101 on ADE20K, softmax: the twin of deeplabv3plus_r101_ade20k.py.

Paper: the DeepLabV3+ row with ResNet-101 of its table on ADE20K.
Trains: batch 16, 160k iterations, crop 512; meant for 4 GPUs, 4 images each.
Command: dnc seg train dnc/configs/deeplabv3plus_r101_ade20k_softmax.py --launcher pytorch
Cost: not measured by us. Expected: no published figure known to us.
"""

_base_ = [
    "mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb4-160k_ade20k-512x512.py",
    "./_base_/dnc.py",
]
