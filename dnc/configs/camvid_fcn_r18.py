"""FCN with half of ResNet-18's width on CamVid, under 3 sub-centroids per class.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_fcn_r18.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = "./camvid_fcn_r18_softmax.py"

# Without a warm start, and with a LayerNorm before the sub-centroids: the weights start at random.
model = dict(
    decode_head=dict(
        type="DNCFCNHead", num_centroids=3, centroids=dict(warm_start=False), embed_norm=True
    )
)
