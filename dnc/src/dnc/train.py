"""Train an encoder under a classifier without parameters (or a learned one): config to run folder.

From sample to checkpoint: data.py, encoders.py, classifier.py, this file.
"""

import io
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from dnc import model_io, pictures, processes
from dnc.anchors import Anchors
from dnc.classifier import NearestCentroidHead
from dnc.collapse import collapse_metrics
from dnc.config import TrainConfig
from dnc.data import DataSplits, build_loader, load_data
from dnc.deployed import Deployed, Network
from dnc.devices import launch_fabric, run_facts
from dnc.encoders import build_encoder
from dnc.evaluate import Diverged
from dnc.heads import build_head
from dnc.optim import build_optimizer, lr_at
from shared_utils import checkpoint
from shared_utils.config import save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import RunLog, open_run, plot_curves, read_metrics, write_result
from shared_utils.seeding import seed_all

CURVES = {
    "loss": ["loss_dnc", "loss_ce", "val_loss"],
    "accuracy": ["val_top1", "val_top5"],
    "sub-centroids": ["centroid_cosine", "centroid_usage", "centroid_purity"],
    "movement (degrees)": ["centroid_movement"],
}
MEMORY = "head.memory."  # what each process has to itself


def train(cfg: TrainConfig) -> Path:
    """Run a configuration: train, test once at the end, write the run folder.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    fabric = launch_fabric(cfg.run)
    seed_all(cfg.run.seed)
    splits = load_data(cfg.data, seed=cfg.run.seed)
    folder = Path()
    if fabric.is_global_zero:
        folder = open_run(
            "dnc",
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

    def __init__(self, cfg: TrainConfig, fabric: Fabric, folder: Path, splits: DataSplits) -> None:
        self.cfg, self.fabric, self.folder, self.splits = cfg, fabric, folder, splits
        encoder = build_encoder(
            cfg.model.encoder,
            img_size=cfg.data.img_size,
            stem=cfg.model.stem,
            pretrained=cfg.model.pretrained,
            embed_norm=cfg.model.embed_norm,
        )
        head = build_head(cfg.model, splits.num_classes, encoder.embed_dim)
        self.is_dnc = isinstance(head, NearestCentroidHead)
        if self.is_dnc:
            counts = torch.from_numpy(splits.train.labels).bincount(minlength=splits.num_classes)
            head.limit_places(counts)
        self.network = Network(encoder, head)
        self.num_parameters = sum(p.numel() for p in self.network.parameters())
        optimizer = build_optimizer(cfg.optim, self.network)
        self.model, self.optimizer = fabric.setup(self.network, optimizer)
        self.deployed = Deployed(cfg, fabric, self.network, splits)
        self.loader = build_loader(
            splits.train,
            cfg.data,
            train=True,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        self.mix = _mixing(cfg, splits.num_classes)
        self.epoch = self.step = 0
        self.best = -1.0

    def run(self) -> Path:
        """Train, evaluate, write."""
        cfg, fabric, splits = self.cfg, self.fabric, self.splits
        warning = self._resume() if cfg.run.resume else ""
        if fabric.is_global_zero:
            save_json(cfg, self.folder / "config.json")
        log = RunLog(
            self.folder,
            is_writer=fabric.is_global_zero,
            resume_step=self.step if cfg.run.resume else -1,
        )
        if warning:
            log.say(f"warning: {warning}")
        for path in splits.skipped:
            log.say(f"left out, unreadable: {path}")
        if self.is_dnc and not bool(self.network.head.active.all()):
            few = int((~self.network.head.active).any(dim=1).sum())
            log.say(
                f"warning: {few} classes have fewer images than sub-centroids; the spare ones are "
                "not in use"
            )
        in_head = sum(p.numel() for p in self.network.head.parameters())
        log.say(
            f"{cfg.model.head} on {cfg.model.encoder}: {self.num_parameters:,} parameters, "
            f"{in_head:,} of them in the classifier; run folder {self.folder}"
        )
        if not cfg.run.resume:
            seed_all(cfg.run.seed + fabric.global_rank)  # processes draw their own noise from here
            self._save()
        scores: dict[str, float] = {}
        seen, seconds = 0, 0.0
        with _resumable(f"dnc train --resume {shlex.quote(str(self.folder))}"):
            with log.progress("train", cfg.optim.epochs * len(self.loader), self.step) as bar:
                for epoch in range(self.epoch, cfg.optim.epochs):
                    begun = time.perf_counter()
                    means, images = self._epoch(epoch, bar)
                    elapsed = time.perf_counter() - begun
                    seconds, seen = seconds + elapsed, seen + images
                    self.epoch = epoch + 1
                    self._require_finite()
                    self.deployed.after_epoch(self.epoch)
                    scores = self.deployed.scores("val", splits.val, self._remedy)
                    values = {
                        **means,
                        "lr": self.optimizer.param_groups[0]["lr"],
                        **scores,
                        "images_per_second": images / elapsed,
                    }
                    log.log(self.step, self.epoch, values)
                    self._save(scores.get("val_top1"))
            extra = self.deployed.finish()
            for split, part in (("val", splits.val), ("test", splits.test)):
                scores |= self.deployed.scores(split, part, self._remedy)
            log.close()
            if fabric.is_global_zero:
                self._write(scores, extra, images_per_second=seen / seconds if seconds else 0.0)
            fabric.barrier()
        log.say("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return self.folder

    def _epoch(self, epoch: int, bar: Any) -> tuple[dict[str, float], int]:
        """One pass over the training images: mean of each loss term, and number of images."""
        cfg, head = self.cfg.optim, self.network.head
        self.model.train()
        self.splits.train.set_epoch(epoch)
        if self.is_dnc:
            before = head.centroids.clone()
            head.reset_usage()
        total: dict[str, float] = {}
        images = 0
        for batch, labels, indices in self.loader:
            lr = lr_at(cfg, self.step, len(self.loader))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            terms = self._step(batch, labels, indices)
            self.step += 1
            images += len(labels)
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value * len(labels)
            loss = sum(terms.values())
            bar.tick(f"epoch {epoch + 1}/{cfg.epochs} loss {loss:.3f}")
        mine = torch.tensor([*total.values(), float(images)], device=self.fabric.device)
        *sums, count = processes.reduce(mine, "sum").tolist()
        means = {name: value / count for name, value in zip(total, sums, strict=True)}
        if self.is_dnc:
            means |= collapse_metrics(head, before)
        return means, int(count)

    def _step(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, float]:
        """One optimiser step, then the sub-centroids; returns the loss terms."""
        fabric = self.fabric
        images, labels, indices = (
            part.to(fabric.device, non_blocking=True) for part in (images, labels, indices)
        )
        targets: Tensor = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        if self.cfg.optim.label_smoothing:
            share = self.cfg.optim.label_smoothing
            count = self.splits.num_classes
            soft = targets if targets.is_floating_point() else F.one_hot(targets, count).float()
            targets = soft * (1 - share) + share / count
        terms: dict[str, Tensor] = self.model(images, targets, indices)
        loss = torch.stack(list(terms.values())).sum()
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(name, f"{value} at step {self.step}", "a finite loss", self._remedy)
        self.optimizer.zero_grad()
        fabric.backward(loss)
        if self.cfg.optim.clip_grad:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=self.cfg.optim.clip_grad)
        self.optimizer.step()
        self.deployed.after_step()
        return values

    def _require_finite(self) -> None:
        """Stop before what an update has ruined takes the place of the last good checkpoint."""
        for name, tensor in self.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                got = f"nan or inf after step {self.step}"
                raise Diverged(name, got, "finite weights", self._remedy)

    @property
    def _remedy(self) -> str:
        return f"lower --optim.lr and go on with --resume {shlex.quote(str(self.folder))}"

    def _save(self, score: float | None = None) -> None:
        """Write last.ckpt, and best.ckpt where the validation accuracy is the highest so far."""
        is_best = score is not None and score > self.best
        if is_best and score is not None:
            self.best = score
        average, anchors = self.deployed.average, self.deployed.anchors
        own = [name for name in self.network.state_dict() if name.startswith(MEMORY)]
        model = self.network.state_dict()
        state = {
            "model": {name: tensor for name, tensor in model.items() if name not in own},
            "average": None if average is None else average.state_dict(),
            "anchors": None if anchors is None else asdict(anchors),
            "optimizer": self.optimizer.state_dict(),
            "processes": self._of_all({"memory": {name: model[name] for name in own}}),
            "scaler": self.fabric._precision.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "config": to_dict(self.cfg),
        }
        if self.fabric.is_global_zero:
            checkpoint.save(state, self.folder / "last.ckpt")
            if is_best:
                checkpoint.save(state, self.folder / "best.ckpt")
        self.fabric.barrier()

    def _of_all(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process has to itself: random state and memory."""
        own = {"rng": checkpoint.rng_state(), **own}
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
        before, now = state["config"], to_dict(self.cfg)
        for group, name in (("model", None), ("optim", "optimizer"), ("optim", "ema_decay")):
            old, new = before[group], now[group]
            changed = [key for key in new if name in (None, key) and old[key] != new[key]]
            if changed:
                raise InputError(
                    f"{group}.{changed[0]}",
                    new[changed[0]],
                    f"{old[changed[0]]}, as before",
                    "leave it, or start a new run",
                )
        of_all, size = state["processes"], self.fabric.world_size
        is_same = len(of_all) == size
        mine = of_all[self.fabric.global_rank if is_same else 0]
        fresh = self.network.state_dict()
        memory = {name: t for name, t in fresh.items() if name.startswith(MEMORY)}
        self.network.load_state_dict({**state["model"], **(mine["memory"] if is_same else memory)})
        if self.deployed.average is not None:
            self.deployed.average.load_state_dict(state["average"])
        if state["anchors"] is not None:
            self.deployed.anchors = Anchors.from_plain(state["anchors"])
        groups = self.optimizer.state_dict()["param_groups"]  # of the options given now
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self.fabric._precision.load_state_dict(state["scaler"])
        if is_same:
            checkpoint.set_rng_state(mine["rng"])
        else:
            seed_all(self.cfg.run.seed + self.fabric.global_rank + 1000 * state["epoch"])
            warning += (
                f" resumed with {size} processes instead of {len(of_all)}: random numbers "
                "differ, and the memory of features starts empty"
            )
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        return warning

    def _write(
        self, scores: dict[str, float], extra: dict[str, Any], images_per_second: float
    ) -> None:
        """Deployable weights, pictures, and last of all result.json."""
        cfg, splits = self.cfg, self.splits
        classifier = self.deployed.classifier
        model_io.save(classifier, self.folder, cfg.model, cfg.data)
        plot_curves(self.folder, CURVES)
        shown = splits.test or splits.val
        if shown is not None:
            features, labels = self.deployed.embedded(shown)
            with torch.no_grad():
                logits = classifier.head(features.to(self.fabric.device)).cpu()
            pictures.confusion(logits, labels, splits.class_names, self.folder / "confusion.png")
        if classifier.anchors is not None:
            pictures.anchors(
                classifier.anchors, splits.train, splits.class_names, self.folder / "anchors.png"
            )
        tops = {name: value for name, value in scores.items() if "_top" in name}
        last = {**read_metrics(self.folder)[-1], **scores}  # of the last epoch; purity as deployed
        write_result(
            self.folder,
            {
                "project": "dnc",
                "name": self.folder.name,
                "recipe": cfg.recipe,
                "method": cfg.model.head,
                "seed": cfg.run.seed,
                "metrics": tops,
                **extra,
                "collapse": {k: v for k, v in last.items() if k.startswith("centroid_")},
                "parameters": {
                    "tuned": self.num_parameters,
                    "total": self.num_parameters,
                    "percent": 100.0,
                    "classifier": sum(p.numel() for p in self.network.head.parameters()),
                },
                "data": splits.summary(),
                "epochs": cfg.optim.epochs,
                "images_per_second": images_per_second,
                **run_facts(self.fabric),
            },
        )


def _mixing(cfg: TrainConfig, num_classes: int) -> Any:
    """Mixup, CutMix or either; (images, labels) -> (images, soft labels). None without."""
    kinds = []
    if cfg.data.mixup:
        kinds.append(v2.MixUp(alpha=cfg.data.mixup, num_classes=num_classes))
    if cfg.data.cutmix:
        kinds.append(v2.CutMix(alpha=cfg.data.cutmix, num_classes=num_classes))
    return v2.RandomChoice(kinds) if kinds else None


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Turn Ctrl-C into the line that goes on from the last checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(command) from None
