"""UPerNet with a small Swin on CamVid, under 3 sub-centroids per class.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_upernet_swin.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = "./camvid_upernet_swin_softmax.py"

# Without a warm start, and with a LayerNorm before the sub-centroids: the weights start at random.
model = dict(
    decode_head=dict(
        type="DNCUPerHead", num_centroids=3, centroids=dict(warm_start=False), embed_norm=True
    )
)
