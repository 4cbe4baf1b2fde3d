"""FCN with ResNet-101 on ADE20K, softmax: the twin of fcn_r101_ade20k.py.

Paper: the FCN row with ResNet-101 of its table on ADE20K.
Trains: batch 16, 160k iterations, crop 512; meant for 4 GPUs, 4 images each.
Command: dnc seg train dnc/configs/fcn_r101_ade20k_softmax.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 39.91 (model zoo of mmsegmentation).
"""

_base_ = ["mmseg::fcn/fcn_r101-d8_4xb4-160k_ade20k-512x512.py", "./_base_/dnc.py"]
