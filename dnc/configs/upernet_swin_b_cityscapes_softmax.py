"""UPerNet with Swin-B on Cityscapes, softmax: the twin of upernet_swin_b_cityscapes.py.

Paper: the UPerNet row with Swin-B of its table on Cityscapes.
Trains: batch 8, 160k iterations, crop 769; meant for 8 GPUs, 1 image each.
Command: dnc seg train dnc/configs/upernet_swin_b_cityscapes_softmax.py --launcher pytorch
Cost: not measured by us. Expected: no published figure known to us.
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/cityscapes_769x769.py",
    "mmseg::_base_/default_runtime.py",
    "./_base_/schedule_swin.py",
    "./_base_/dnc.py",
]

checkpoint_file = (
    "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/"
    "swin_base_patch4_window7_224_20220317-e9b98025.pth"
)
model = dict(
    data_preprocessor=dict(size=(769, 769)),
    backbone=dict(
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file),
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=19),
    auxiliary_head=dict(in_channels=512, num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(769, 769), stride=(513, 513)),
)
train_dataloader = dict(batch_size=1)
