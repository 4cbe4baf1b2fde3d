"""Faster R-CNN on generated scenes of digits, softmax: the twin of digitboxes_faster_rcnn.py."""

_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["dnc.mmdet"], allow_failed_imports=False)
custom_hooks = [
    dict(type="CentroidHook"),
    dict(type="RandomStateHook"),
    dict(type="PlainCheckpointHook"),
]
data_root = "runs/data/digitscenes"
scene_size = (128, 128)
max_epochs = 12
channels = 64

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scene_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scene_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="DigitBoxes",
        data_root=data_root,
        ann_file="boxes/training.json",
        data_prefix=dict(img="images/training"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DigitBoxes",
        data_root=data_root,
        ann_file="boxes/validation.json",
        data_prefix=dict(img="images/validation"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DigitBoxes",
        data_root=data_root,
        ann_file="boxes/test.json",
        data_prefix=dict(img="images/test"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=max_epochs, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=4, max_keep_ckpts=1))
