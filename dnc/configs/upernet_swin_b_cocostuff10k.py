"""UPerNet with Swin-B on COCO-Stuff 10k, under 10 sub-centroids per class.

Paper: the UPerNet row with Swin-B of its table on COCO-Stuff 10k.
Trains: batch 16, 160k iterations, crop 512; meant for 8 GPUs, 2 images each.
Command: dnc seg train dnc/configs/upernet_swin_b_cocostuff10k.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 43.1 (SSA-Seg, NeurIPS 2024, its table 2).
"""

_base_ = "./upernet_swin_b_cocostuff10k_softmax.py"

model = dict(decode_head=dict(type="DNCUPerHead", num_centroids=10))
