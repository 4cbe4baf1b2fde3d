"""FCN with half of ResNet-18's width on CamVid, softmax behind a LayerNorm.

The control of camvid_fcn_r18.py: its features are those, and the classifier alone differs.

Trains: batch 8, 1500 iterations, crop 192 x 256.
Command: dnc seg train dnc/configs/camvid_fcn_r18_softmax_norm.py --data-root FOLDER
Cost, and what it reaches: SEGMENTATION.md.
"""

_base_ = "./camvid_fcn_r18_softmax.py"

model = dict(decode_head=dict(type="LayerNormFCNHead"))
