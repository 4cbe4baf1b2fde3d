"""Train prompts (or a baseline) on a frozen backbone: from a configuration to a run folder."""

import io
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from e2vpt import model_io, pictures, prompt_report, start
from e2vpt.backbones import Backbone, load_backbone
from e2vpt.config import PruneConfig, TrainConfig
from e2vpt.data import DataSplits, ImageSet, build_loader, load_data
from e2vpt.devices import launch_fabric, run_facts
from e2vpt.evaluate import Diverged, evaluate, predict_set
from e2vpt.methods import build_spec
from e2vpt.model import PromptedModel, load_tuned_state, parameter_report, tuned_state
from e2vpt.optim import build_optimizer, lr_at, set_lr
from shared_utils import checkpoint
from shared_utils.config import save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import RunLog, open_run, plot_curves, write_result
from shared_utils.seeding import seed_all

CURVES = {
    "loss": ["loss_ce", "val_loss"],
    "accuracy": ["val_top1", "val_top5"],
    "learning rate": ["lr"],
}


@dataclass(frozen=True)
class Setup:
    """What several runs on the same images and backbone share."""

    fabric: Fabric
    backbone: Backbone
    splits: DataSplits


def prepare(cfg: TrainConfig) -> Setup:
    """Devices, backbone and images of a run.  Raises: InputError for what the user can mend."""
    fabric = launch_fabric(cfg.run)
    seed_all(cfg.run.seed)
    size = cfg.data.img_size
    backbone = load_backbone(
        cfg.model.backbone, cfg.model.architecture, img_size=(size, size) if size else None
    )
    splits = load_data(
        cfg.data,
        img_size=backbone.img_size,
        mean=backbone.mean,
        std=backbone.std,
        seed=cfg.run.seed,
    )
    return Setup(fabric, backbone, splits)


def train(cfg: TrainConfig, setup: Setup | None = None, folder: Path | None = None) -> Path:
    """Run a configuration: train, test once at the end, write the run folder.

    The result is that of the last epoch, as in the paper's protocol for VTAB-1k; `best.ckpt` keeps
    the epoch of the highest validation accuracy (the first of equals).

    Args:
        cfg: what to run.
        setup: of this data and backbone, where several runs share them.
        folder: where it goes, made by the caller; by default a new run folder. A run whose place
            is given is one of many in a search and draws no pictures.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    setup = setup or prepare(cfg)
    fabric, splits = setup.fabric, setup.splits
    splits = replace(splits, train=splits.train.with_seed(cfg.run.seed))
    spec = build_spec(cfg.model, splits.num_classes)
    module = setup.backbone.module
    network, scores = start.build_network(cfg, spec, module, splits, fabric)
    is_trial = folder is not None
    if fabric.is_global_zero:
        folder = folder or open_run(
            "e2vpt",
            cfg.recipe,
            runs_dir=cfg.run.runs_dir,
            name=cfg.run.name,
            resume=cfg.run.resume,
            overwrite=cfg.run.overwrite,
        )
        if scores is not None:
            start.save_scores(scores, cfg.prune, folder)
    folder = Path(fabric.broadcast(str(folder)))
    return _Training(cfg, fabric, folder, setup.backbone, splits, network, is_trial).run()


class _Training:
    """The state of one run; `run` is the whole of it in order."""

    def __init__(
        self,
        cfg: TrainConfig,
        fabric: Fabric,
        folder: Path,
        backbone: Backbone,
        splits: DataSplits,
        network: PromptedModel,
        is_trial: bool = False,
    ) -> None:
        self.is_trial = is_trial
        self.cfg, self.fabric, self.folder = cfg, fabric, folder
        self.backbone, self.splits, self.network = backbone, splits, network
        scale = cfg.data.batch_size * fabric.world_size / 256 if cfg.optim.scale_lr else 1.0
        self.peak_lr = cfg.optim.lr * scale
        optimizer = build_optimizer(
            cfg.optim.optimizer,
            network.named_parameters(),
            lr=self.peak_lr,
            weight_decay=cfg.optim.weight_decay,
        )
        self.model, self.optimizer = fabric.setup(network, optimizer)
        self.loader = build_loader(
            splits.train,
            cfg.data,
            train=True,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pin_memory=fabric.device.type == "cuda",
        )
        self.epoch = self.step = 0
        self.best = -1.0
        self.report = parameter_report(network)

    def run(self) -> Path:
        """Train, evaluate, write."""
        cfg, fabric = self.cfg, self.fabric
        warning = self._resume() if cfg.run.resume else ""
        if fabric.is_global_zero:  # only now: a resume that was refused leaves the old one
            again = replace(cfg, run=replace(cfg.run, resume="", overwrite=False))
            save_json(again, self.folder / "config.json")
        log = RunLog(
            self.folder,
            is_writer=fabric.is_global_zero,
            resume_step=self.step if cfg.run.resume else -1,
        )
        if warning:
            log.say(f"warning: {warning}")
        for path in self.splits.skipped:
            log.say(f"left out, unreadable: {path}")
        percent = f"{self.report['percent']:.2f} %"
        log.say(
            f"{cfg.model.method} on {self.backbone.name}: {self.report['tuned']:,} of "
            f"{self.report['total']:,} parameters train ({percent}); run folder {self.folder}"
        )
        # Every process starts from one seed, so that all build the same prompts; from here on
        # their dropout must differ.
        if not cfg.run.resume:
            seed_all(cfg.run.seed + fabric.global_rank)
            if fabric.is_global_zero:
                start.save_initial(self.network, self.folder)
            self._save()
        scores: dict[str, float] = {}
        seen, seconds = 0, 0.0
        with _resumable(f"e2vpt train --resume {shlex.quote(str(self.folder))}"):
            with log.progress("train", cfg.optim.epochs * len(self.loader), self.step) as bar:
                for epoch in range(self.epoch, cfg.optim.epochs):
                    begun = time.perf_counter()
                    mean_loss, images = self._epoch(epoch, bar)
                    elapsed = time.perf_counter() - begun
                    seconds, seen = seconds + elapsed, seen + images
                    self.epoch = epoch + 1
                    self._require_finite()
                    scores = self._evaluate(self.splits.val, "val")
                    values = {
                        "loss_ce": mean_loss,
                        "lr": self.optimizer.param_groups[0]["lr"],
                        **scores,
                        "images_per_second": images / elapsed,
                    }
                    log.log(self.step, self.epoch, values)
                    self._save(scores.get("val_top1"))
            if cfg.run.resume and not scores:
                scores = self._evaluate(self.splits.val, "val")
            scores |= self._evaluate(self.splits.test, "test")
            log.close()
            if fabric.is_global_zero:
                self._write(scores, images_per_second=seen / seconds if seconds else 0.0)
            fabric.barrier()
        log.say("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return self.folder

    def _epoch(self, epoch: int, bar: Any) -> tuple[float, int]:
        """One pass over the training images: mean loss and number of images, all processes."""
        cfg = self.cfg.optim
        self.model.train()
        self.splits.train.set_epoch(epoch)
        total, images = 0.0, 0
        for batch, labels in self.loader:
            lr = lr_at(
                self.step,
                schedule=cfg.schedule,
                peak=self.peak_lr,
                steps_per_epoch=len(self.loader),
                epochs=cfg.epochs,
                warmup_epochs=cfg.warmup_epochs,
            )
            set_lr(self.optimizer, lr)
            loss = self._step(batch, labels)
            self.step += 1
            total += loss * len(labels)
            images += len(labels)
            bar.tick(f"epoch {epoch + 1}/{cfg.epochs} loss {loss:.3f}")
        sums = self.fabric.all_reduce(
            torch.tensor([total, float(images)], device=self.fabric.device), reduce_op="sum"
        )
        return float(sums[0] / sums[1]), int(sums[1])

    def _step(self, images: Tensor, labels: Tensor) -> float:
        """One optimiser step; returns the loss."""
        logits = self.model(images.to(self.fabric.device, non_blocking=True))
        loss = F.cross_entropy(logits.float(), labels.to(self.fabric.device, non_blocking=True))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                "loss_ce",
                f"{value} at step {self.step}",
                "a finite loss",
                self._remedy,
            )
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        return value

    @property
    def _remedy(self) -> str:
        return f"lower --optim.lr and go on with --resume {shlex.quote(str(self.folder))}"

    def _require_finite(self) -> None:
        """Stop before what an update has ruined takes the place of the last good checkpoint."""
        for name, tensor in tuned_state(self.network).items():
            if not torch.isfinite(tensor).all():
                got = f"nan or inf after step {self.step}"
                raise Diverged(name, got, "finite weights", self._remedy)

    def _evaluate(self, images: ImageSet | None, split: str) -> dict[str, float]:
        if images is None:
            return {}
        # The network without its DDP wrapper, which would wait for the other processes at every
        # batch, and they may have one batch less.
        scores = evaluate(
            self.fabric,
            self.network,
            images,
            self.cfg.data,
            self.splits.num_classes,
            when=f" on the {split} images after step {self.step}",
            remedy=self._remedy,
        )
        return {f"{split}_{name}": value for name, value in scores.items()}

    def _save(self, score: float | None = None) -> None:
        """Write last.ckpt, and best.ckpt where the validation accuracy is the highest so far."""
        is_best = score is not None and score > self.best
        if is_best and score is not None:
            self.best = score
        state = {
            "model": tuned_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "rng": self._rng_of_all(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "scaler": self.fabric._precision.state_dict(),
            "backbone": self.backbone.sha256,
            "spec": self.network.spec.dict(),
            "config": to_dict(self.cfg),
        }
        if self.fabric.is_global_zero:
            checkpoint.save(state, self.folder / "last.ckpt")
            if is_best:
                checkpoint.save(state, self.folder / "best.ckpt")
        self.fabric.barrier()

    def _rng_of_all(self) -> list[dict[str, Any]]:
        """The random state of every process: their dropout differs."""
        own = checkpoint.rng_state()
        if self.fabric.world_size == 1:
            return [own]
        packed = io.BytesIO()  # NumPy's uint32 tensor does not survive the gathering's pickle
        torch.save(own, packed)
        states: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(states, packed.getvalue())
        return [torch.load(io.BytesIO(state), weights_only=True) for state in states]

    def _resume(self) -> str:
        """Put back the last checkpoint; returns a warning to show."""
        path = self.folder / "last.ckpt"
        state, warning = checkpoint.load_last(path)
        if state["backbone"] != self.backbone.sha256:
            raise InputError(
                "model.backbone",
                f"weights {self.backbone.sha256[:12]}",
                f"{state['backbone'][:12]}, those the run began with",
                "use the same file",
            )
        began_with = state["config"]["optim"]["optimizer"]
        if self.cfg.optim.optimizer != began_with:
            raise InputError(
                "optim.optimizer", self.cfg.optim.optimizer, f"{began_with}, as before", "leave it"
            )
        pruning = state["config"].get("prune") or asdict(PruneConfig())  # runs of before had none
        start.require_same_pruning(self.cfg.prune, pruning)
        load_tuned_state(self.network, state["model"], str(path))
        groups = self.optimizer.state_dict()["param_groups"]  # of the options given now
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:  # of float16's loss
            self.fabric._precision.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.fabric.world_size:
            checkpoint.set_rng_state(state["rng"][self.fabric.global_rank])
        else:
            seed_all(self.cfg.run.seed + self.fabric.global_rank + 1000 * state["epoch"])
            warning += (
                f" resumed with {self.fabric.world_size} processes instead of {len(state['rng'])}:"
                " random numbers differ"
            )
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        return warning

    def _write(self, scores: dict[str, float], images_per_second: float) -> None:
        """Deployable weights, pictures, and last of all result.json."""
        cfg, splits = self.cfg, self.splits
        model_io.save(
            self.network,
            self.folder,
            backbone=self.backbone,
            class_names=splits.class_names,
            preprocessing=splits.preprocessing,
        )
        shown = None if self.is_trial else splits.test or splits.val
        if not self.is_trial:
            plot_curves(self.folder, CURVES)
            prompt_report.write(self.fabric, self.network, splits, cfg, self.folder)
        if shown is not None:
            logits, labels = predict_set(self.fabric, self.network, shown, cfg.data)
            pictures.confusion(logits, labels, splits.class_names, self.folder / "confusion.png")
            pictures.predictions(shown, logits, splits.class_names, self.folder / "predictions.png")
        write_result(
            self.folder,
            {
                "project": "e2vpt",
                "name": self.folder.name,
                "recipe": cfg.recipe,
                "method": cfg.model.method,
                "seed": cfg.run.seed,
                "metrics": {k: v for k, v in scores.items() if not k.endswith("_loss")},
                "parameters": {key: self.report[key] for key in ("tuned", "total", "percent")},
                "backbone": {
                    "name": self.backbone.name,
                    "weights": self.backbone.weights,
                    "sha256": self.backbone.sha256,
                },
                "normalize": cfg.data.normalize,
                "prune": asdict(cfg.prune) if cfg.prune.source else None,
                "data": splits.summary(),
                "epochs": cfg.optim.epochs,
                "images_per_second": images_per_second,
                **run_facts(self.fabric),
            },
        )


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Turn Ctrl-C into the line that goes on from the last checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(command) from None
