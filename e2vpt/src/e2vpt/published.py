"""What is special in checkpoints as the authors of MAE, MoCo v3 and DINOv3 publish them.

MAE (`mae_pretrain_vit_base.pth`): an encoder without a classifier, under `model`; its training
checkpoints hold the decoder too. MoCo v3: `vit-b-300ep.pth.tar` holds two encoders with projection
heads and a predictor, `linear-vit-b-300ep.pth.tar` one encoder with a classifier, both under
`state_dict` with the prefix of distributed training. DINOv3: biases that timm keeps in some of its
models only.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MOCO_V3_SMALL = (384, 12)  # width and heads; timm's ViT-S, and others', has 6


def is_moco_v3(state: Mapping[str, Tensor], arch: object) -> bool:
    """Whether a checkpoint is of MoCo v3's vision transformers.

    Args:
        state: without the prefix of distributed training.
        arch: what the checkpoint says it is, or None. Its own linear classifiers say `vit_small`
            or `vit_base`, as other training code might; but position embeddings that are fixed,
            with zeros for the class token, are MoCo v3's.
    """
    if "base_encoder.cls_token" in state:
        return True
    position = state.get("pos_embed")
    named = isinstance(arch, str) and arch in ("vit_small", "vit_base")
    return named and position is not None and position.ndim == 3 and not position[:, 0].any()


def encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder alone, without what its pretraining needed besides; other files as they are.

    Of MoCo v3's two encoders it is the base encoder, the one its authors evaluate.
    """
    if "base_encoder.cls_token" in state:
        base = {k.removeprefix("base_encoder."): v for k, v in state.items() if k[:5] == "base_"}
        return {key: value for key, value in base.items() if not key.startswith("head.")}
    if "decoder_embed.weight" in state:
        decoder = ("decoder_", "mask_token")
        return {key: value for key, value in state.items() if not key.startswith(decoder)}
    return dict(state)


def homeless_biases(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """DINOv3's biases of queries, keys and values, where the timm model has none.

    timm's conversion would drop them whatever they are. Those of the keys are masked in DINOv3.

    Returns: names of all, and of those whose queries' or values' part is not zero.
    """
    if "storage_tokens" not in state or any(
        name.endswith("attn.q_bias") for name, _ in module.named_parameters()
    ):
        return [], []
    found = [name for name in state if name.endswith("attn.qkv.bias")]
    queries_values = {name: state[name].chunk(3)[::2] for name in found}
    return found, [name for name in found if any(part.any() for part in queries_values[name])]


def set_moco_v3_heads(module: Any) -> None:
    """Give a ViT-S the 12 heads of MoCo v3's, in place; the shapes of its weights are the same."""
    width, heads = MOCO_V3_SMALL
    if not isinstance(module, VisionTransformer) or module.embed_dim != width:
        return
    for attn in module.modules():
        if isinstance(attn, Attention):
            attn.num_heads, attn.head_dim = heads, width // heads
            attn.scale = attn.head_dim**-0.5


def average_patches(module: VisionTransformer) -> None:
    """Pool the mean of the patch tokens, then a new norm, instead of the class token; in place.

    MAE's pretraining has no loss on its class token. The final norm of its pretraining is
    taken away, and the new one (`fc_norm`) starts with weight 1 and bias 0. On a frozen backbone
    it stays so, as in the paper's code. Differs from it: prompts are not averaged, see
    `pool_prompts`.
    """
    norm: Any = deepcopy(module.norm)
    norm.reset_parameters()
    module.norm, module.fc_norm = nn.Identity(), norm
    module.reset_classifier(0, "avg")
