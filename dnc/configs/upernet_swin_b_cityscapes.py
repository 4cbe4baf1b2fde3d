"""UPerNet with Swin-B on Cityscapes, under 10 sub-centroids per class.

Paper: the UPerNet row with Swin-B of its table on Cityscapes.
Trains: batch 8, 160k iterations, crop 769; meant for 8 GPUs, 1 image each.
Command: dnc seg train dnc/configs/upernet_swin_b_cityscapes.py --launcher pytorch
Cost: not measured by us. Expected: no figure of ours yet.
"""

_base_ = "./upernet_swin_b_cityscapes_softmax.py"

model = dict(decode_head=dict(type="DNCUPerHead", num_centroids=10))
