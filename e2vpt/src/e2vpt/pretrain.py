"""Supervised pretraining of the micro ViT on a packed image set.

The run is long on a CPU, so it may be interrupted anywhere: `last.ckpt` is written every few
hundred steps and at an interrupt, and `--resume RUN` goes on in the middle of the epoch. With the
`trapezoid` schedule `--optim.epochs` may still be raised on resume before the descent begins.
"""

import copy
import dataclasses
import hashlib
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.augmentation import MEAN, STD, augment, cutmix, normalize
from e2vpt.devices import launch_fabric, run_facts
from e2vpt.interrupts import uninterrupted
from e2vpt.micro_vit import IMG_SIZE, build_micro_vit
from e2vpt.optim import build_muon, build_optimizer, lr_at, set_lr
from e2vpt.packed import PackedImages
from e2vpt.pretrain_config import HEAD_DIM, PretrainConfig, PretrainData
from shared_utils import checkpoint
from shared_utils.config import save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.metrics import classification_metrics
from shared_utils.run_log import RunLog, Ticker, open_run, plot_curves, write_result
from shared_utils.seeding import seed_all

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # steps
CURVES = {"loss": ["loss_ce"], "accuracy": ["val_top1", "val_top5"], "learning rate": ["lr"]}


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: nn.Module, images: Tensor, labels: Tensor, num_classes: int
) -> dict[str, float]:
    """Top-1 and top-5 over a set of uint8 images."""
    metrics = classification_metrics(num_classes).to(fabric.device)
    was_training = model.training
    model.eval()
    for part, truth in zip(images.split(500), labels.split(500), strict=True):
        with fabric.autocast():
            logits = model(normalize(part.to(fabric.device)))
        metrics.update(logits.float(), truth.to(fabric.device))
    model.train(was_training)
    return {name: float(value) for name, value in metrics.compute().items()}


@dataclasses.dataclass(frozen=True)
class _Images:
    """uint8 (N, 3, 32, 32) and int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def pretrain(cfg: PretrainConfig) -> Path:
    """Train, evaluate the averaged weights after every epoch, and write the run folder.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    fabric = launch_fabric(cfg.run)
    if fabric.world_size > 1:
        raise InputError("processes", fabric.world_size, "1", "pretrain with one process")
    seed_all(cfg.run.seed)
    train_set, val_set, classes = _load(cfg.data)
    folder = open_run(
        "e2vpt",
        "pretrain",
        runs_dir=cfg.run.runs_dir,
        name=cfg.run.name,
        resume=cfg.run.resume,
        overwrite=cfg.run.overwrite,
    )
    return _Pretraining(cfg, fabric, folder, train_set, val_set, classes).run()


def _load(cfg: PretrainData) -> tuple[_Images, _Images, list[str]]:
    packed = {"data.train": PackedImages(cfg.train), "data.val": PackedImages(cfg.val)}
    classes = packed["data.train"].classes
    if classes != packed["data.val"].classes:
        raise InputError(
            "data.val",
            "class names that differ from those of data.train",
            "the same",
            "pack both with one list of classes",
        )
    sets = []
    for field, images in packed.items():
        count = min(cfg.limit, len(images)) if cfg.limit else len(images)
        if not count:
            raise InputError(field, f"no images in '{images.path}'", "some", "pack it again")
        # Evenly spread: a packed file is often sorted by class.
        chosen = [i * len(images) // count for i in range(count)]
        pixels = images.pixels(chosen)
        if pixels.shape[-2:] != (IMG_SIZE, IMG_SIZE):
            raise InputError(
                field,
                f"images of {tuple(pixels.shape[-2:])}",
                f"{IMG_SIZE}x{IMG_SIZE}",
                "resize them before packing",
            )
        sets.append(_Images(pixels, torch.tensor(images.labels)[chosen]))
    if len(sets[0]) < cfg.batch_size:
        expected = f"at most {len(sets[0])}, the number of training images"
        raise InputError("data.batch_size", cfg.batch_size, expected, "lower it")
    return sets[0], sets[1], classes


class _Pretraining:
    """The state of one run; `run` is the whole of it in order."""

    def __init__(
        self,
        cfg: PretrainConfig,
        fabric: Fabric,
        folder: Path,
        train_set: _Images,
        val_set: _Images,
        classes: list[str],
    ) -> None:
        self.cfg, self.fabric, self.folder, self.classes = cfg, fabric, folder, classes
        self.train_set, self.val_set = train_set, val_set
        self.network = build_micro_vit(
            len(classes),
            embed_dim=cfg.model.embed_dim,
            depth=cfg.model.depth,
            num_heads=cfg.model.embed_dim // HEAD_DIM,
        )
        if fabric.device.type == "cpu":
            # Short sequences: plain softmax is twice as fast there in training.
            for block in cast(Any, self.network).blocks:
                block.attn.fused_attn = False
        self.ema = ModelEmaV3(
            self.network, decay=cfg.optim.ema_decay, use_warmup=True, device=fabric.device
        )
        parameters, decay = self.network.named_parameters(), cfg.optim.weight_decay
        if cfg.optim.optimizer == "muon":
            optimizer = build_muon(parameters, lr=cfg.optim.lr, weight_decay=decay)
        else:
            optimizer = build_optimizer("adamw", parameters, lr=cfg.optim.lr, weight_decay=decay)
        compiled: Any = torch.compile(self.network) if cfg.model.compile else self.network
        self.model, self.optimizer = fabric.setup(compiled, optimizer)
        self.steps_per_epoch = len(train_set) // cfg.data.batch_size
        self.step, self.best = 0, 0.0
        self.scores: dict[str, float] = {}
        self.scored_at = 0  # the step at which `scores` were measured

    def run(self) -> Path:
        """Train, evaluate, write."""
        cfg, resumed = self.cfg, bool(self.cfg.run.resume)
        warning = self._resume() if resumed else ""
        # Only now: a resume that was refused leaves the old one.
        again = dataclasses.replace(cfg.run, resume="", overwrite=False)
        save_json(dataclasses.replace(cfg, run=again), self.folder / "config.json")
        log = RunLog(self.folder, resume_step=self.step if resumed else -1)
        if warning:
            log.say(f"warning: {warning}")
        total, begun, first = (
            self.steps_per_epoch * cfg.optim.epochs,
            time.perf_counter(),
            self.step,
        )
        try:
            with log.progress("pretrain", total, self.step) as bar:
                while True:
                    # First of all: an interrupt may have come between an epoch and its score.
                    if self.step > self.scored_at and self.step % self.steps_per_epoch == 0:
                        self._score(log)
                    if self.step >= total:
                        break
                    self._epoch(log, bar)
            seconds = time.perf_counter() - begun
            self._write((self.step - first) * cfg.data.batch_size / seconds)
        except KeyboardInterrupt:
            with uninterrupted():
                self._save()
            resume = f"e2vpt pretrain --resume {shlex.quote(str(self.folder))}"
            raise Interrupted(resume) from None
        log.close()
        return self.folder

    def _epoch(self, log: RunLog, bar: Ticker) -> None:
        """The rest of the epoch that `step` is in."""
        cfg = self.cfg
        epoch = self.step // self.steps_per_epoch
        generator = torch.Generator().manual_seed(cfg.run.seed * 10_000 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator)
        self.model.train()
        tick, ticked = time.perf_counter(), self.step
        for batch in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            chosen = order[batch * cfg.data.batch_size : (batch + 1) * cfg.data.batch_size]
            lr = lr_at(
                self.step,
                schedule=cfg.optim.schedule,
                peak=cfg.optim.lr,
                steps_per_epoch=self.steps_per_epoch,
                epochs=cfg.optim.epochs,
                warmup_epochs=cfg.optim.warmup_epochs,
            )
            with uninterrupted():  # weights, moments, average, step and log belong together
                set_lr(self.optimizer, lr)
                images, labels = self.train_set.pixels[chosen], self.train_set.labels[chosen]
                loss = train_step(self.fabric, self.model, self.optimizer, images, labels, cfg)
                if not math.isfinite(loss):
                    got = f"{loss} at step {self.step}"
                    raise InputError("loss_ce", got, "a finite loss", self._remedy)
                self.ema.update(self.network, step=self.step)
                self.step += 1
                bar.tick(f"loss {loss:.3f}")
                if self.step % LOG_EVERY == 0:
                    now = time.perf_counter()
                    speed = (self.step - ticked) * cfg.data.batch_size / (now - tick)
                    log.log(
                        self.step, epoch, {"loss_ce": loss, "lr": lr, "images_per_second": speed}
                    )
                    tick, ticked = now, self.step
            if self.step % SAVE_EVERY == 0:
                self._save()

    def _score(self, log: RunLog) -> None:
        """Evaluate the averaged weights at the end of an epoch, and save."""
        epoch = self.step // self.steps_per_epoch
        scores = evaluate(
            self.fabric,
            self.ema.module,
            self.val_set.pixels,
            self.val_set.labels,
            len(self.classes),
        )
        with uninterrupted():
            self.scores, self.scored_at = scores, self.step
            self.best = max(self.best, scores["top1"])
            log.log(self.step, epoch - 1, {f"val_{k}": v for k, v in scores.items()})
            self._save()
        told = "  ".join(f"val_{name} {value:.4f}" for name, value in scores.items())
        log.say(f"epoch {epoch}/{self.cfg.optim.epochs}  {told}")

    @property
    def _remedy(self) -> str:
        return f"lower --optim.lr and go on with --resume {shlex.quote(str(self.folder))}"

    def _save(self) -> None:
        """Write last.ckpt. Raises: InputError where a weight is NaN or infinite."""
        for name, tensor in self.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                got = f"nan or inf after step {self.step}"
                raise InputError(name, got, "finite weights", self._remedy)
        state = {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.fabric._precision.state_dict(),
            "rng": checkpoint.rng_state(),
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "best": self.best,
            "scores": self.scores,
            "scored_at": self.scored_at,
            "config": to_dict(self.cfg),
        }
        checkpoint.save(state, self.folder / "last.ckpt")

    def _resume(self) -> str:
        """Put back the last checkpoint; returns a warning to show."""
        state, warning = checkpoint.load_last(self.folder / "last.ckpt")
        # Told by the moments' own settings: the first runs' configurations do not name it.
        began_with = "muon" if "ns_steps" in state["optimizer"]["param_groups"][0] else "adamw"
        if self.cfg.optim.optimizer != began_with:
            raise InputError(
                "optim.optimizer",
                self.cfg.optim.optimizer,
                f"{began_with}, which the run began with",
                f"add --optim.optimizer {began_with}",
            )
        try:
            self.network.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise InputError(
                "--resume",
                f"a model that does not fit {self.folder} ({str(error).splitlines()[-1].strip()})",
                "the sizes and classes the run began with",
                "leave --model and --data as they were",
            ) from error
        groups = self.optimizer.state_dict()["param_groups"]  # of the options given now
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state.get("scaler"):  # of float16's loss
            self.fabric._precision.load_state_dict(state["scaler"])
        checkpoint.set_rng_state(state["rng"])
        self.step, self.best = state["step"], state["best"]
        self.scores, self.scored_at = state.get("scores", {}), state.get("scored_at", 0)
        return warning

    def _write(self, images_per_second: float) -> None:
        """The backbone, the curves, and last of all result.json."""
        cfg = self.cfg
        export_backbone(self.ema.module, self.folder, cfg, self.classes, self.scores)
        plot_curves(self.folder, CURVES)
        count = sum(p.numel() for p in self.network.parameters())
        write_result(
            self.folder,
            {
                "project": "e2vpt",
                "name": self.folder.name,
                "recipe": cfg.recipe,
                "seed": cfg.run.seed,
                "metrics": {f"val_{k}": v for k, v in self.scores.items()},
                "parameters": {"tuned": count, "total": count, "percent": 100.0},
                "data": {
                    "name": cfg.data.train.resolve().parent.name,
                    "train_images": len(self.train_set),
                    "val_images": len(self.val_set),
                    "test_images": 0,
                },
                "epochs": cfg.optim.epochs,
                "images_per_second": images_per_second,
                **run_facts(self.fabric),
            },
        )


def train_step(
    fabric: Fabric, model: Any, optimizer: Any, images: Tensor, labels: Tensor, cfg: PretrainConfig
) -> float:
    """One optimiser step on uint8 images; returns the loss."""
    x = normalize(augment(images)).to(fabric.device).contiguous(memory_format=torch.channels_last)
    y = labels.to(fabric.device)
    other, share = y, 1.0
    if float(torch.rand(())) < cfg.data.mix_prob:
        x, other, share = cutmix(x, y)
    logits = model(x).float()
    smoothing = cfg.optim.label_smoothing
    loss = share * F.cross_entropy(logits, y, label_smoothing=smoothing)
    if share < 1:
        loss = loss + (1 - share) * F.cross_entropy(logits, other, label_smoothing=smoothing)
    optimizer.zero_grad()
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=cfg.optim.clip_norm)
    optimizer.step()
    return float(loss.detach())


def export_backbone(
    network: nn.Module,
    folder: Path,
    cfg: PretrainConfig,
    classes: list[str],
    scores: dict[str, float],
) -> None:
    """Write `model.safetensors` (fp16) and `model.json` with where it comes from."""
    half = {
        k: v.half() if v.is_floating_point() else v
        for k, v in copy.deepcopy(network).cpu().state_dict().items()
    }
    path = folder / "model.safetensors"
    checkpoint.save_weights(half, path, {"format": "pt"})
    card = {
        "architecture": {
            **dataclasses.asdict(cfg.model),
            "num_classes": len(classes),
            "img_size": IMG_SIZE,
        },
        "mean": MEAN,
        "std": STD,
        "classes": classes,
        "config": _without_places(cfg),
        "val": scores,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    checkpoint.write_text(json.dumps(card, indent=2) + "\n", folder / "model.json")


def _without_places(cfg: PretrainConfig) -> dict[str, Any]:
    """The configuration for a file that is passed on: no folders of this machine."""
    config = to_dict(cfg)
    for split in ("train", "val"):
        path = Path(config["data"][split]).resolve()
        config["data"][split] = f"{path.parent.name}/{path.name}"
    config["run"] = {key: config["run"][key] for key in ("seed", "precision")}
    return config
