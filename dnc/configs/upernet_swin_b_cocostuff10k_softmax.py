"""UPerNet with Swin-B on COCO-Stuff 10k, softmax: the twin of upernet_swin_b_cocostuff10k.py.

Paper: the UPerNet row with Swin-B of its table on COCO-Stuff 10k.
Trains: batch 16, 160k iterations, crop 512; meant for 8 GPUs, 2 images each.
Command: dnc seg train dnc/configs/upernet_swin_b_cocostuff10k_softmax.py --launcher pytorch
Cost: not measured by us. Expected: mIoU 42.8 (SSA-Seg, NeurIPS 2024, its table 2).
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/coco-stuff10k.py",
    "mmseg::_base_/default_runtime.py",
    "./_base_/schedule_swin.py",
    "./_base_/dnc.py",
]

checkpoint_file = (
    "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/"
    "swin_base_patch4_window7_224_20220317-e9b98025.pth"
)
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file),
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=171),
    auxiliary_head=dict(in_channels=512, num_classes=171),
)
train_dataloader = dict(batch_size=2)
