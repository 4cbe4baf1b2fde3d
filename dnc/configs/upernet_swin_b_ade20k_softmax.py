"""UPerNet with Swin-B on ADE20K, softmax: the twin of upernet_swin_b_ade20k.py.

Paper: the UPerNet row with Swin-B of its table on ADE20K.
Trains: batch 16, 160k iterations, crop 512; meant for 8 GPUs, 2 images each.
Command: dnc seg train dnc/configs/upernet_swin_b_ade20k_softmax.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 47.99 (model zoo of mmsegmentation).
"""

_base_ = [
    "mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
    "./_base_/dnc.py",
]
