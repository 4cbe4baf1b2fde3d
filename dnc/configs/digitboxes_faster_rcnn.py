"""Faster R-CNN under sub-centroids on generated scenes of digits, in mmdetection, on a CPU.

Command: make install-mmdet, then
.venv-mmdet/bin/python -m dnc.mmdet dnc/configs/digitboxes_faster_rcnn.py
"""

_base_ = "./digitboxes_faster_rcnn_softmax.py"

# A LayerNorm before the sub-centroids, since the weights start at random.
bbox_head = dict(type="DNCShared2FCBBoxHead", num_centroids=4, embed_norm=True)
model = dict(roi_head=dict(bbox_head=bbox_head))
