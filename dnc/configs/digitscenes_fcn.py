"""The embedded default: FCN under sub-centroids on generated scenes of digits, on a CPU.

Paper: the FCN rows of the tables on segmentation, in small: ResNet-18 with half the channels, 10
sub-centroids per class.
Command: dnc seg train dnc/configs/digitscenes_fcn.py
Cost: minutes on two cores. Does not learn yet: mIoU 0.08 so far.
"""

_base_ = "./digitscenes_fcn_softmax.py"

# The network starts from nothing: sub-centroids that followed it at once, as a warm start makes
# them, would be of the same places for all digits, and there would be nothing to learn from.
model = dict(
    decode_head=dict(type="DNCFCNHead", num_centroids=10, centroids=dict(warm_start=False))
)
