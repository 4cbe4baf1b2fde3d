"""What happens to sub-centroids around a training step of mmengine's Runner."""

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch.nn import functional as F

from dnc.collapse import collapse_metrics
from dnc.mmseg.owners import centroid_heads


@HOOKS.register_module()
class CentroidHook(Hook):
    """Moves the sub-centroids after each optimiser step, before averages and checkpoints are made.

    With an EMAHook whose `update_buffers` is on, averaged sub-centroids go with averaged weights;
    they are brought to unit length before they are evaluated or saved. Without it the averaged
    weights are evaluated with the sub-centroids of the latest weights, of which a warning tells.
    """

    priority = "HIGH"

    def __init__(self, interval: int = 100) -> None:
        """Log how alike and evenly used sub-centroids are, every `interval` steps (0: never)."""
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        """Take over the updates."""
        self.heads = centroid_heads(runner.model)
        for _, head in self.heads:
            head.is_hooked = True
        self._restart(is_new=runner.iter == 0)
        if self.heads and any(not ema.ema_model.update_buffers for ema in _averages(runner)):
            print_log(
                "EMAHook evaluates averaged weights with sub-centroids of the latest weights; "
                "give it update_buffers=True to average them too",
                "current",
            )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Cluster the pixels of this step; in all processes."""
        for _, head in self.heads:
            head.classifier.update()
        if self.interval and self.every_n_train_iters(runner, self.interval):
            for (name, head), before in zip(self.heads, self.before, strict=True):
                for measure, value in collapse_metrics(head.classifier, before).items():
                    runner.message_hub.update_scalar(f"train/{name}.{measure}", value)
            self._restart(is_new=True)

    def after_train(self, runner: Any) -> None:
        """Give the updates back."""
        for _, head in self.heads:
            head.is_hooked = False

    def before_val_epoch(self, runner: Any) -> None:
        """Bring averaged sub-centroids to unit length, before the averages are swapped in."""
        _normalize_averages(runner)

    def before_test_epoch(self, runner: Any) -> None:
        """As for validation."""
        _normalize_averages(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """As for validation."""
        _normalize_averages(runner)

    def _restart(self, is_new: bool) -> None:
        """Measure from here; a resumed run goes on counting."""
        self.before = [head.classifier.centroids.clone() for _, head in self.heads]
        for _, head in self.heads if is_new else ():
            head.classifier.reset_usage()


def _averages(runner: Any) -> list[Any]:
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


@torch.no_grad()
def _normalize_averages(runner: Any) -> None:
    """Unit length for averaged sub-centroids; what is counted and not averaged is the model's."""
    for ema in _averages(runner):
        if not getattr(ema, "ema_model", None) or not ema.ema_model.update_buffers:
            continue
        own = dict(centroid_heads(ema.src_model))
        for name, head in centroid_heads(ema.ema_model.module):
            points = head.classifier.centroids
            points.copy_(F.normalize(points, dim=2))
            for key, buffer in head.classifier.named_buffers():
                if not buffer.is_floating_point():
                    buffer.copy_(own[name].classifier.get_buffer(key))
