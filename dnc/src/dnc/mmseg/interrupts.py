"""Ctrl-C between two steps, with a checkpoint; and random numbers that go on where they were."""

import signal
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from dnc.processes import reduce, world_size
from shared_utils.errors import Interrupted


@HOOKS.register_module()
class InterruptHook(Hook):
    """Lets Ctrl-C wait for the end of the step and save; a second one stops at once."""

    priority = "LOWEST"

    def __init__(self, command: str = "") -> None:
        """Tell `command` as the line that goes on."""
        self.command, self.is_stopping = command, False

    def before_train(self, runner: Any) -> None:
        """Take the signal over; only a main thread can."""
        try:
            self.old = signal.signal(signal.SIGINT, self._stop)
        except ValueError:
            self.old = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save and stop, where it was asked for.

        Raises: Interrupted with the line that goes on.
        """
        # All processes stop after the same step, whichever was told first.
        device = next(runner.model.parameters()).device
        if world_size() > 1 and not reduce(
            torch.tensor(int(self.is_stopping), device=device), "max"
        ):
            return
        if world_size() == 1 and not self.is_stopping:
            return
        self._give_back()
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                hook._save_checkpoint(runner)
        raise Interrupted(self.command)

    def after_train(self, runner: Any) -> None:
        """Give the signal back."""
        self._give_back()

    def _stop(self, number: int, frame: Any) -> None:
        if self.is_stopping:
            raise KeyboardInterrupt
        self.is_stopping = True

    def _give_back(self) -> None:
        if self.old is not None:
            signal.signal(signal.SIGINT, self.old)


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Saves torch's random state and goes on from it, so that a resumed run is the same run.

    mmengine draws the data of the steps before again, and with it the random numbers of crops; what
    dropout draws is torch's. A validation between two steps leaves it as it was. With several
    processes each starts from its seed anew.
    """

    priority = "LOW"
    KEY = "dnc_random_state"

    def __init__(self) -> None:
        """Nothing is to be put back yet."""
        self.waiting: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint[self.KEY] = {"torch": torch.get_rng_state(), "cuda": cuda}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Remember it until the first step: drawing data comes before."""
        if runner._resume and runner.world_size == 1:
            self.waiting = checkpoint.get(self.KEY)

    def before_val_epoch(self, runner: Any) -> None:
        """Remember the state: a loader draws from it."""
        self.kept = torch.get_rng_state()

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """Put it back."""
        torch.set_rng_state(self.kept)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Put back what was saved, once."""
        if self.waiting is None:
            return
        torch.set_rng_state(self.waiting["torch"].cpu())
        for i, state in enumerate(self.waiting["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), i)
        self.waiting = None


def saved_steps(folder: Path) -> list[Path]:
    """Checkpoints of a run that may be gone on from, the latest first."""
    numbered = [(int(p.stem.rpartition("_")[2]), p) for p in folder.glob("iter_*.pth")]
    numbered += [(int(p.stem.rpartition("_")[2]), p) for p in folder.glob("epoch_*.pth")]
    return [path for _, path in sorted(numbered, reverse=True)]
