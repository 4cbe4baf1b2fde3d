"""UPerNet with a small Swin on CamVid, under 10 sub-centroids per class.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_upernet_swin.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = "./camvid_upernet_swin_softmax.py"

# From random weights: sub-centroids that move at once follow features that tell nothing yet apart.
model = dict(
    decode_head=dict(type="DNCUPerHead", num_centroids=10, centroids=dict(warm_start=False))
)
