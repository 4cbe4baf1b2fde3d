"""How the terms become one number: constant gains, or weights of the tasks that are learned.

The paper's gains are not known; these are those of its parents (boxes YOLOv7, masks YOLOP).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared_utils.errors import InputError, near_miss

TASK_OF = {
    "loss_box": "detection",
    "loss_obj": "detection",
    "loss_cls": "detection",
    "loss_drivable": "drivable",
    "loss_lane_focal": "lane",
    "loss_lane_dice": "lane",
    "loss_lane_iou": "lane",
}
BASE_GAINS = {
    "loss_box": 0.05,
    "loss_obj": 0.7,
    "loss_cls": 0.3,
    "loss_drivable": 0.2,
    "loss_lane_focal": 1.0,
    "loss_lane_dice": 0.2,
    "loss_lane_iou": 0.2,
}


def default_gains(
    *, num_classes: int, img_size: tuple[int, int], base: Mapping[str, float] = BASE_GAINS
) -> dict[str, float]:
    """Gains for a number of classes and a size (H, W) in pixels.

    The class term's is meant for 80 classes and grows with them, objectness's for 640 pixels and
    grows with the square of the longer side.
    """
    return dict(base) | {
        "loss_cls": base["loss_cls"] * num_classes / 80,
        "loss_obj": base["loss_obj"] * (max(img_size) / 640) ** 2,
    }


class LossWeights(nn.Module):
    """Weights the terms, once, and adds them up.

    Learned weights follow Kendall et al., "Multi-Task Learning Using Uncertainty" (CVPR 2018), in
    its simplest form: the gained terms of a task sum up to l, and exp(-v) l + v is added, with one
    v a task, 0 at the start; so it starts as with constant weights. A task with l = 0 has nothing
    labelled and adds nothing.

    Attributes:
        log_variances: v of each task; empty with constant weights.
    """

    def __init__(
        self, *, gains: Mapping[str, float], tasks: tuple[str, ...], is_learned: bool = False
    ) -> None:
        """Build for the tasks that are on.

        Raises: InputError for a gain of an unknown term or one that is negative or not finite.
        """
        super().__init__()
        for name, gain in gains.items():
            if name not in TASK_OF:
                do = near_miss(name, TASK_OF)
                raise InputError("gains", f"'{name}'", "a known term", do)
            if not 0 <= gain < float("inf"):
                raise InputError(f"gains.{name}", gain, "0 or more", "correct it")
        self.gains = dict(gains)
        self.log_variances = nn.ParameterDict(
            {task: nn.Parameter(torch.zeros(())) for task in tasks if is_learned}
        )

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and every term as it stands in it (without v)."""
        gained = {name: self.gains[name] * loss for name, loss in losses.items()}
        if not len(self.log_variances):
            return torch.stack(list(gained.values())).sum(), gained
        weighted: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        for task, v in self.log_variances.items():
            own = {name: loss for name, loss in gained.items() if TASK_OF[name] == task}
            if own:
                is_labelled = torch.stack(list(own.values())).sum().detach() > 0
                own = {name: torch.exp(-v) * loss for name, loss in own.items()}
                weighted |= own
                parts += [*own.values(), v * is_labelled]
        return torch.stack(parts).sum(), weighted
