"""FCN with ResNet-18 on CamVid from random weights, under 10 sub-centroids per class.

Trains: batch 8, 2000 iterations, crop 240 x 320.
Command: dnc seg train dnc/configs/camvid_fcn_r18.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = "./camvid_fcn_r18_softmax.py"

# From random weights: sub-centroids that move at once follow features that tell nothing yet apart.
model = dict(
    decode_head=dict(type="DNCFCNHead", num_centroids=10, centroids=dict(warm_start=False))
)
