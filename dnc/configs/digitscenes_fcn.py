"""The embedded default: FCN under sub-centroids on generated scenes of digits, on a CPU.

Paper: the FCN rows of the tables on segmentation, in small: ResNet-18 with half the channels, 10
sub-centroids per class.
Command: make train-dnc-seg, or dnc seg train dnc/configs/digitscenes_fcn.py
Cost: two and a half minutes on two cores of a server CPU with AMX.
"""

_base_ = "./digitscenes_fcn_softmax.py"

# The network starts from nothing, and no try with a warm start learned. Perhaps sub-centroids chase
# features that do not differ by class yet; other settings changed too, so the cause is not tested.
model = dict(
    decode_head=dict(type="DNCFCNHead", num_centroids=10, centroids=dict(warm_start=False))
)
