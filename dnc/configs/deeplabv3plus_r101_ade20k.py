"""DeepLabV3+ with ResNet-101 on ADE20K, under 10 sub-centroids per class.

Paper: the DeepLabV3+ row with ResNet-101 of its table on ADE20K.
Trains: batch 16, 160k iterations, crop 512; meant for 4 GPUs, 4 images each.
Command: dnc seg train dnc/configs/deeplabv3plus_r101_ade20k.py --launcher pytorch
Cost: not measured by us. Expected: no figure of ours yet.
"""

_base_ = "./deeplabv3plus_r101_ade20k_softmax.py"

model = dict(decode_head=dict(type="DNCDepthwiseSeparableASPPHead", num_centroids=10))
