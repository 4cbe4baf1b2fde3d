"""UPerNet with a small Swin on CamVid, softmax: the twin of camvid_upernet_swin.py.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_upernet_swin_softmax.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = ["mmseg::_base_/default_runtime.py", "./_base_/camvid.py"]

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="SwinTransformer",
        embed_dims=48,
        depths=(2, 2, 2, 2),
        num_heads=(2, 4, 8, 16),
        window_size=7,
        drop_path_rate=0.1,
        patch_norm=True,
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[48, 96, 192, 384],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=96,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
