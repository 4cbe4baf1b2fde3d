"""Turn deep visual prompts into key-value prompts: the same logits at the plain length.

All that a deep visual prompt does in a layer is to offer one key and one value row per head,
K = k_norm(W_k LN(p) + b_k) and V = W_v LN(p) + b_v. They do not depend on the image, so they are
computed once and the prompt itself is dropped.
"""

from dataclasses import replace

import torch

from e2vpt.model import PromptedModel
from shared_utils.errors import InputError


@torch.no_grad()
def fold(model: PromptedModel) -> PromptedModel:
    """Replace visual prompts by the key and value rows they amount to.

    Args:
        model: stays usable and unchanged.

    Returns: a new model in eval mode on the same frozen backbone, with unshared key-value prompts
        only, for use rather than further training: P + n rows per layer.

    Raises: InputError where it would not be exact: shallow prompts, whose outputs go on to the
        next layer; prompts that are pooled; a backbone that trains, whose weights the rows hold;
        adapters, which are not prompts.
    """
    spec, visual = model.spec, model.visual
    last = model.geometry.num_layers - 1
    if spec.backbone_trains != "none":
        raise _refused(f"a backbone that trains ({spec.backbone_trains})", "a frozen one")
    if spec.adapter != "none":
        raise _refused(f"adapters ({spec.adapter})", "prompts alone")
    if visual is not None and not spec.deep and last > 0:
        raise _refused("shallow prompts, which run through all layers", "deep ones")
    if visual is not None and spec.pool_prompts:
        raise _refused("prompts that are pooled (pool_prompts)", "prompts that are not")
    new = replace(
        spec,
        folded=True,
        token_form=False,
        pool_prompts=False,
        num_segments=1,
        num_kept_segments=1,
        zeroed=False,
        prompt_dim=0,
        share_kv=False,
    )
    fast = PromptedModel(model.backbone, new)
    fast.head.load_state_dict(model.head.state_dict())
    if fast.kv is not None and fast.kv.value is not None:
        for layer, (keys, values) in enumerate(zip(fast.kv.key, fast.kv.value, strict=True)):
            parts = []
            if visual is not None:
                rows = visual.rows(layer)
                parts.append(model.family.folded_rows(model.backbone, layer, rows))
            if model.kv is not None and layer < model.kv.num_layers:
                parts.append(model.kv(layer))
            keys.copy_(torch.cat([key for key, _ in parts], dim=1))
            values.copy_(torch.cat([value for _, value in parts], dim=1))
    return fast.eval()


def _refused(got: str, expected: str) -> InputError:
    return InputError("model", got, f"{expected}: folding would not be exact", "use it as it is")
