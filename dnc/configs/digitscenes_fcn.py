"""The embedded default: FCN under sub-centroids on generated scenes of digits, on a CPU.

Paper: the FCN rows of the tables on segmentation, in small: ResNet-18 with half the channels, 10
sub-centroids per class.
Command: make train-dnc-seg, or dnc seg train dnc/configs/digitscenes_fcn.py
Cost: minutes on two cores. Seen: mIoU 0.73 after 400 of its 800 iterations.
"""

_base_ = "./digitscenes_fcn_softmax.py"

# The network starts from nothing: sub-centroids that followed it at once, as a warm start makes
# them, would be of the same places for all digits, and there would be nothing to learn from.
model = dict(
    decode_head=dict(type="DNCFCNHead", num_centroids=10, centroids=dict(warm_start=False))
)
