"""E²VPT: prompt tuning of frozen vision transformers with visual and key-value prompts.

Paper: Han et al., "E²VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023.
"""

from e2vpt.attention_maps import attention_to_prompts
from e2vpt.bank import PromptBank
from e2vpt.fold import fold
from e2vpt.model import parameter_report, prompt, remove
from e2vpt.model_io import load, save
from e2vpt.pruning import importance, prune

__all__ = [
    "PromptBank",
    "attention_to_prompts",
    "fold",
    "importance",
    "load",
    "parameter_report",
    "prompt",
    "prune",
    "remove",
    "save",
]
__version__ = "0.1.0"
