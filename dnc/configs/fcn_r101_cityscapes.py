"""FCN with ResNet-101 on Cityscapes, under 10 sub-centroids per class.

Paper: the FCN row with ResNet-101 of its table on Cityscapes.
Trains: batch 8, 160k iterations, crop 769; meant for 4 GPUs, 2 images each.
Command: dnc seg train dnc/configs/fcn_r101_cityscapes.py --launcher pytorch
Cost: not measured by us. Expected: no figure of ours yet.
"""

_base_ = "./fcn_r101_cityscapes_softmax.py"

model = dict(decode_head=dict(type="DNCFCNHead", num_centroids=10))
