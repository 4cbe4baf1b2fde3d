"""DeepLabV3 with ResNet-101 on Cityscapes, softmax: the twin of deeplabv3_r101_cityscapes.py.

Paper: the DeepLabV3 row with ResNet-101 of its table on Cityscapes.
Trains: batch 8, 160k iterations, crop 769; meant for 4 GPUs, 2 images each.
Command: dnc seg train dnc/configs/deeplabv3_r101_cityscapes_softmax.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 79.67 after 80k iterations (model zoo of mmsegmentation).
"""

_base_ = ["mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-769x769.py", "./_base_/dnc.py"]

param_scheduler = [
    dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=160000, by_epoch=False)
]
train_cfg = dict(max_iters=160000)
