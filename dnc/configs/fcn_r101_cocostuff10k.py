"""FCN with ResNet-101 on COCO-Stuff 10k, under 10 sub-centroids per class.

Paper: the FCN row with ResNet-101 of its table on COCO-Stuff 10k.
Trains: batch 16, 160k iterations, crop 512; meant for 4 GPUs, 4 images each.
Command: dnc seg train dnc/configs/fcn_r101_cocostuff10k.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 33.0 (SSA-Seg, NeurIPS 2024, its table 2).
"""

_base_ = "./fcn_r101_cocostuff10k_softmax.py"

model = dict(decode_head=dict(type="DNCFCNHead", num_centroids=10))
