"""DeepLabV3 with half of ResNet-18 on CamVid, softmax: the twin of camvid_deeplabv3_r18.py.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_deeplabv3_r18_softmax.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = ["mmseg::_base_/default_runtime.py", "./_base_/camvid.py"]

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 1, 2),
        strides=(1, 2, 2, 1),
        norm_cfg=norm_cfg,
        norm_eval=False,
        style="pytorch",
        contract_dilation=True,
    ),
    decode_head=dict(
        type="ASPPHead",
        in_channels=256,
        in_index=3,
        channels=128,
        dilations=(1, 6, 12, 18),
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
