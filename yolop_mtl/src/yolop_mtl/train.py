"""Train the network on its tasks: config to run folder.

From sample to checkpoint: dataset.py, model.py, losses.py, learner.py, this file.

A step is of 64 images by default: so many batches are accumulated over all processes. Loss terms
are means over their batch, and are logged so: gains and curves do not depend on the batch size.
Under SGD what is differentiated is the mean times the images of the step, as in YOLOv7, whose rate
of 0.01 is meant for that; under AdamW, which does not see the scale, it is the mean.
"""

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from shared_utils import checkpoint
from shared_utils.config import from_dict, save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import RunLog, open_run
from shared_utils.seeding import seed_all
from yolop_mtl import model_io, processes
from yolop_mtl.assemble import Splits, build_losses, build_network, choose_anchors, load_splits
from yolop_mtl.boxes import Anchors
from yolop_mtl.config import TrainConfig
from yolop_mtl.dataset import Batch, DrivingDataset, build_loader
from yolop_mtl.devices import launch_fabric
from yolop_mtl.ema import ModelEma
from yolop_mtl.evaluate import evaluate
from yolop_mtl.learner import Learner, fitness
from yolop_mtl.optim import NOMINAL_BATCH, build_optimizer, rates_at, set_rates
from yolop_mtl.pretrained import load_pretrained
from yolop_mtl.report import say_metrics, write_curves, write_report, write_train_batch

# What a run goes on with has to be what it began with.
FIXED = {
    "model": None,
    "optim": ("optimizer", "freeze"),
    "data": ("classes", "area_classes", "img_size"),
    "loss": ("is_learned",),
}


def train(cfg: TrainConfig) -> Path:
    """Run a configuration: train, validate, write the run folder.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    fabric = launch_fabric(cfg.run)
    seed_all(cfg.run.seed)
    splits = load_splits(cfg, fabric)
    folder = Path()
    if fabric.is_global_zero:
        folder = open_run(
            "yolop_mtl",
            cfg.recipe,
            runs_dir=cfg.run.runs_dir,
            name=cfg.run.name,
            resume=cfg.run.resume,
            overwrite=cfg.run.overwrite,
        )
    folder = Path(fabric.broadcast(str(folder)))
    return _Training(cfg, fabric, folder, splits).run()


class _Training:
    """The state of one run; `run` is the whole of it in order."""

    def __init__(self, cfg: TrainConfig, fabric: Fabric, folder: Path, splits: Splits) -> None:
        self.cfg, self.fabric, self.folder, self.splits = cfg, fabric, folder, splits
        self.notes: list[str] = []  # to say once there is a log
        self.state: dict[str, Any] = {}
        if cfg.run.resume:
            self.state = self._read_state()
        model = build_network(
            cfg.model,
            cfg.data,
            num_classes=len(splits.class_names),
            anchors=self._anchors(),
        )
        if cfg.model.weights and not cfg.run.resume:
            report = load_pretrained(model, Path(cfg.model.weights))
            self.notes.append(f"{cfg.model.weights}: {report}")
        if cfg.run.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learner = Learner(
            model, *build_losses(cfg.loss, model, cfg.data.img_size), freeze=cfg.optim.freeze
        )
        self._build_loaders()
        self.ema = ModelEma(model.to(fabric.device), decay=cfg.optim.ema_decay)
        if cfg.run.sync_batchnorm:
            self._join_norms()
        optimizer = build_optimizer(
            cfg.optim, self.learner, images_per_step=self.images_per_pass * self.accumulate
        )
        self.module, self.optimizer = fabric.setup(self.learner, optimizer)
        self.epoch = self.step = self.stale = 0
        self.best = -1.0
        self.best_metrics: dict[str, float] = {}

    def run(self) -> Path:
        """Train, validate, write."""
        cfg, fabric = self.cfg, self.fabric
        if self.state:
            self._restore()
        if fabric.is_global_zero:
            save_json(cfg, self.folder / "config.json")
        log = RunLog(
            self.folder,
            is_writer=fabric.is_global_zero,
            resume_step=self.step if cfg.run.resume else -1,
        )
        for note in self.notes:
            log.say(note)
        total = sum(p.numel() for p in self.learner.model.parameters())
        log.say(
            f"{cfg.model.preset} for {', '.join(self.learner.model.tasks)}: {total:,} parameters; "
            f"{len(self.splits.train):,} images for training, {len(self.splits.val):,} for "
            f"validation, {self.images_per_pass * self.accumulate} a step; run folder {self.folder}"
        )
        if not cfg.run.resume:
            seed_all(cfg.run.seed + fabric.global_rank)
            self._save()
        seen, seconds = 0, 0.0
        with _resumable(f"yolop-mtl train --resume {shlex.quote(str(self.folder))}"):
            batches = cfg.optim.epochs * len(self.loader)
            with log.progress("train", batches, self.epoch * len(self.loader)) as bar:
                for epoch in range(self.epoch, cfg.optim.epochs):
                    if self._has_stopped(log):
                        break
                    begun = time.perf_counter()
                    means, images = self._epoch(epoch, bar)
                    elapsed = time.perf_counter() - begun
                    seconds, seen = seconds + elapsed, seen + images
                    self.epoch = epoch + 1
                    self._after_epoch()
                    values = {**means, "lr": rates_at(cfg.optim, self.place, self.steps).lr}
                    is_best = False
                    if self.epoch % cfg.run.val_every == 0 or self.epoch == cfg.optim.epochs:
                        metrics, is_best = self._validate()
                        values |= metrics
                        log.say(f"epoch {self.epoch}: {say_metrics(metrics)}")
                    log.log(
                        self.step, self.epoch, {**values, "images_per_second": images / elapsed}
                    )
                    self._save(is_best=is_best)
            log.close()
            if fabric.is_global_zero:
                write_report(
                    cfg, fabric, self.folder, self.splits, self.best_metrics, epochs=self.epoch,
                    images_per_second=seen / seconds if seconds else 0.0,
                )  # fmt: skip
            fabric.barrier()
        log.say(f"best: {say_metrics(self.best_metrics)}")
        return self.folder

    # ---- one epoch ---------------------------------------------------------------------------

    def _epoch(self, epoch: int, bar: Any) -> tuple[dict[str, float], int]:
        """One pass over the training images: mean of each loss term, and number of images."""
        cfg = self.cfg
        self.module.train()
        left = cfg.optim.epochs - epoch
        self.loader.dataset.set_epoch(epoch, close_mosaic=left <= cfg.augment.close_mosaic)
        sums: dict[str, float] = {}
        self.place = epoch * self.steps
        for number, batch in enumerate(self.loader):
            first = number - number % self.accumulate
            count = min(self.accumulate, len(self.loader) - first)
            if number == first:
                set_rates(self.optimizer, rates_at(cfg.optim, self.place, self.steps))
                self.optimizer.zero_grad()
            is_last = number + 1 == first + count
            terms = self._backward(batch, count, is_last=is_last)
            if is_last:
                self._update()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            bar.tick(f"epoch {epoch + 1}/{cfg.optim.epochs} loss {terms['loss']:.3f}")
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        totals = processes.add_up(totals.float().to(self.fabric.device))
        passes = len(self.loader) * self.fabric.world_size
        means = {name: value / passes for name, value in zip(sums, totals.tolist(), strict=True)}
        return means, len(self.loader) * self.images_per_pass

    def _backward(self, batch: Batch, count: int, *, is_last: bool) -> dict[str, float]:
        """Add the gradient of one of the `count` batches of a step; returns the loss terms."""
        fabric = self.fabric
        images = batch.images.to(fabric.device, non_blocking=True)
        if self.cfg.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = batch.targets.to(fabric.device, non_blocking=True)
        with fabric.no_backward_sync(self.module, enabled=not is_last):
            total, terms = self.module(images, targets)
            names = ("loss", *terms)
            stacked: Tensor = torch.stack([total, *terms.values()]).detach()
            values = dict(zip(names, stacked.tolist(), strict=True))
            for name, value in values.items():
                if not math.isfinite(value):
                    got = f"{value} in epoch {self.epoch + 1}, step {self.step + 1}"
                    raise InputError(name, got, "a finite loss", self._remedy)
            is_sum = self.cfg.optim.optimizer == "sgd"
            fabric.backward(total * (self.images_per_pass if is_sum else 1 / count))
        return values

    def _update(self) -> None:
        """One step of the optimiser and of the average."""
        if self.cfg.optim.clip_grad:
            self.fabric.clip_gradients(
                self.module,
                self.optimizer,
                max_norm=self.cfg.optim.clip_grad,
                error_if_nonfinite=False,  # with loss scaling such a step is left out
            )
        self.optimizer.step()
        self.ema.update(self.learner.model)
        self.step += 1
        self.place += 1

    def _after_epoch(self) -> None:
        """Share running statistics; stop before ruined weights take a checkpoint's place."""
        if self.fabric.world_size > 1:
            for model in (self.learner.model, self.ema.model):
                for buffer in model.buffers():
                    buffer.copy_(self.fabric.broadcast(buffer).to(buffer.device))
        for name, tensor in self.learner.state_dict().items():
            if not torch.isfinite(tensor).all():
                got = f"nan or inf after step {self.step}"
                raise InputError(name, got, "finite weights", self._remedy)

    def _validate(self) -> tuple[dict[str, float], bool]:
        """Metrics of the averaged network on all validation images; whether they are the best."""
        found = evaluate(
            self.ema.model,
            self.val_loader,
            class_names=self.splits.class_names,
            data=self.cfg.data,
            device=self.fabric.device,
            autocast=self.fabric.autocast,
            gather=processes.gather if self.fabric.world_size > 1 else None,
        )
        metrics = dict(self.fabric.broadcast(found.metrics))
        is_best = self._compare(metrics)
        if is_best and self.fabric.is_global_zero:
            write_curves(found, self.splits.class_names, self.folder)
        return metrics, is_best

    def _compare(self, metrics: dict[str, float]) -> bool:
        """Whether they are the best so far; adds their fitness."""
        score = fitness(metrics, self.cfg.fitness.weights)
        metrics["fitness"] = score
        self.stale += 1
        if score <= self.best:
            return False
        self.best, self.best_metrics, self.stale = score, dict(metrics), 0
        return True

    def _has_stopped(self, log: RunLog) -> bool:
        patience = self.cfg.optim.patience
        has = 0 < patience <= self.stale
        if has:
            log.say(f"stopped: {self.stale} validations without a better fitness")
        return has

    @property
    def _remedy(self) -> str:
        return f"lower --optim.lr and go on with --resume {shlex.quote(str(self.folder))}"

    # ---- parts -------------------------------------------------------------------------------

    def _anchors(self) -> Anchors:
        """Those of the run to go on with, otherwise as configured."""
        stored = self.state.get("model", {}).get("detection.anchors")
        if stored is not None:
            table: Anchors = stored.tolist()
            return table
        table, note = choose_anchors(self.cfg, self.splits.train)
        self.notes += [note] * bool(note)
        return table

    def _build_loaders(self) -> None:
        cfg, fabric = self.cfg, self.fabric
        seed, tasks = cfg.run.seed, cfg.model.tasks
        shared: dict[str, Any] = {
            "batch_size": cfg.data.batch_size,
            "num_workers": cfg.data.num_workers,
            "seed": seed,
            "rank": fabric.global_rank,
            "world_size": fabric.world_size,
        }
        train, val = (
            DrivingDataset(records, cfg.data, tasks=tasks, augment=augment, seed=seed)
            for records, augment in ((self.splits.train, cfg.augment), (self.splits.val, None))
        )
        self.loader: Any = build_loader(train, shuffle=True, drop_last=True, **shared)
        self.val_loader: Any = build_loader(val, shuffle=False, drop_last=False, **shared)
        self.images_per_pass = cfg.data.batch_size * fabric.world_size
        wanted = cfg.optim.accumulate or max(1, round(NOMINAL_BATCH / self.images_per_pass))
        self.accumulate = min(wanted, len(self.loader))
        self.steps = math.ceil(len(self.loader) / self.accumulate)  # of an epoch
        self.place = 0  # of the schedule, in steps
        if fabric.is_global_zero and not cfg.run.resume:
            write_train_batch(train, self.folder, self.splits.class_names, cfg.data.batch_size)

    def _join_norms(self) -> None:
        """Let norms see the batches of all processes."""
        if self.fabric.world_size > 1:
            if self.fabric.device.type != "cuda":
                do = "leave it out"
                raise InputError("sync_batchnorm", "processes on CPUs", "GPUs", do)
            self.learner.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learner.model)

    # ---- checkpoints -------------------------------------------------------------------------

    def _save(self, *, is_best: bool = False) -> None:
        """Write last.ckpt; where this is the best network, best.ckpt and the network alone."""
        state = {
            "model": self.learner.model.state_dict(),
            "loss_weights": self.learner.weights.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.fabric._precision.state_dict(),
            "rng": processes.gather_states(checkpoint.rng_state()),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_metrics": self.best_metrics,
            "stale": self.stale,
            "config": to_dict(self.cfg),
        }
        if self.fabric.is_global_zero:
            checkpoint.save(state, self.folder / "last.ckpt")
            if is_best:
                checkpoint.save(state, self.folder / "best.ckpt")
                model_io.save(
                    self.ema.model,
                    self.folder,
                    config=self.cfg.model,
                    data=self.cfg.data,
                    class_names=self.splits.class_names,
                )
        self.fabric.barrier()

    def _read_state(self) -> dict[str, Any]:
        """The last checkpoint of the run to go on with, if it fits the configuration."""
        state, warning = checkpoint.load_last(self.folder / "last.ckpt")
        self.notes += [f"warning: {warning}"] * bool(warning)
        # Of an earlier version's run a newer option is what it was without.
        before = to_dict(from_dict(TrainConfig, state["config"]))
        now = to_dict(self.cfg)
        for group, names in FIXED.items():
            for name in names or now[group]:
                old, new = before[group][name], now[group][name]
                if old != new:
                    do = "leave it, or start a new run"
                    raise InputError(f"{group}.{name}", new, f"{old}, as before", do)
        return state

    def _restore(self) -> None:
        """Put back what the checkpoint holds."""
        state, self.state = self.state, {}
        self.learner.model.load_state_dict(state["model"])
        self.learner.weights.load_state_dict(state["loss_weights"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.fabric._precision.load_state_dict(state["scaler"])
        of_all, size = state["rng"], self.fabric.world_size
        if len(of_all) == size:
            checkpoint.set_rng_state(of_all[self.fabric.global_rank])
        else:
            self.notes.append(
                f"warning: resumed with {size} processes instead of {len(of_all)}: batches differ"
            )
        self.epoch, self.step, self.stale = state["epoch"], state["step"], state["stale"]
        self.best, self.best_metrics = state["best"], state["best_metrics"]


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Turn Ctrl-C into the line that goes on from the last checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(command) from None
