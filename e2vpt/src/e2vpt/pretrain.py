"""Supervised pretraining of the micro ViT on a packed image set.

The run is long on a CPU, so it may be interrupted anywhere: `last.ckpt` is written every few
hundred steps and at an interrupt, and `--resume RUN` goes on in the middle of the epoch. With the
`trapezoid` schedule `--optim.epochs` may still be raised on resume before the descent begins.
"""

import copy
import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from e2vpt.config import RunConfig, devices_of, run_facts
from e2vpt.micro_vit import IMG_SIZE, build_micro_vit
from e2vpt.optim import Schedule, build_optimizer, lr_at, set_lr
from e2vpt.packed import PackedImages
from shared_utils import checkpoint
from shared_utils.config import save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.metrics import classification_metrics
from shared_utils.run_log import RunLog, open_run, plot_curves, write_result
from shared_utils.seeding import seed_all

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_PADDING = 4  # pixels
LOG_EVERY = 50  # steps


@dataclass(frozen=True, kw_only=True)
class PretrainModel:
    """The micro ViT's size."""

    embed_dim: int = 192
    """width; 64 per head"""
    depth: int = 6
    """number of transformer blocks"""
    compile: bool = False
    """torch.compile the training step (needs a C++ compiler on a CPU)"""


@dataclass(frozen=True, kw_only=True)
class PretrainData:
    """Where the images are, and how they are varied."""

    train: Path = Path("train.npz")
    """packed training images, 32x32"""
    val: Path = Path("val.npz")
    """packed validation images, 32x32"""
    batch_size: int = 128
    """images per step and process"""
    limit: int = 0
    """use only this many training and validation images (0: all), for quick runs"""
    mix_prob: float = 0.3
    """share of the steps that use CutMix (box area from a uniform distribution)"""


@dataclass(frozen=True, kw_only=True)
class PretrainOptim:
    """AdamW on a schedule per step."""

    lr: float = 1.5e-3
    """peak learning rate"""
    weight_decay: float = 0.05
    """decoupled decay of weights, none on biases and norms"""
    epochs: int = 30
    """passes over the training images"""
    warmup_epochs: float = 1.0
    """epochs of linear warm-up"""
    schedule: Schedule = "cosine"
    """cosine, trapezoid (flat, then linear to 0) or per-epoch"""
    label_smoothing: float = 0.1
    """mass given to the other classes"""
    clip_norm: float = 1.0
    """largest gradient norm"""
    ema_decay: float = 0.999
    """decay of the averaged weights that are evaluated and shipped"""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`e2vpt pretrain`: train the micro ViT from scratch."""

    recipe: tyro.conf.Suppress[str] = "tiny-imagenet-32"
    about: tyro.conf.Suppress[str] = (
        "micro ViT on Tiny-ImageNet-200 at 32x32; about 4 minutes an epoch on two cores"
    )
    model: PretrainModel = field(default_factory=PretrainModel)
    data: PretrainData = field(default_factory=PretrainData)
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(precision="bf16-mixed")
    )


PRETRAIN_RECIPES = {"tiny-imagenet-32": PretrainConfig()}
SAVE_EVERY = 300  # steps


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float, ImageNet statistics."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor) -> Tensor:
    """Flips and crops after padding by 4 pixels, each image its own. uint8 (B, 3, H, W), a copy."""
    b, _, h, w = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, b, 1, 1))
    rows = top + torch.arange(h).view(1, h, 1)
    columns = left + torch.arange(w).view(1, 1, w)
    flip = torch.rand(b, 1, 1) < 0.5
    columns = torch.where(flip, columns.flip(-1), columns)
    index = torch.arange(b).view(b, 1, 1)
    return padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Put a box of a shuffled copy of the batch into it: images, other labels, own share."""
    _, _, h, w = images.shape
    area = float(torch.rand(()))
    box_h, box_w = round(h * area**0.5), round(w * area**0.5)
    top = int(torch.randint(0, h - box_h + 1, ()))
    left = int(torch.randint(0, w - box_w + 1, ()))
    order = torch.randperm(len(images))
    mixed = images.clone()
    mixed[:, :, top : top + box_h, left : left + box_w] = images[
        order, :, top : top + box_h, left : left + box_w
    ]
    return mixed, labels[order], 1 - box_h * box_w / (h * w)


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


def pretrain(cfg: PretrainConfig) -> Path:
    """Train, evaluate the averaged weights after every epoch, and write the run folder."""
    fabric = Fabric(**devices_of(cfg.run))
    fabric.launch()
    if fabric.world_size > 1:
        raise InputError("processes", fabric.world_size, "1", "pretrain with one process")
    seed_all(cfg.run.seed)
    train_set, val_set = PackedImages(cfg.data.train), PackedImages(cfg.data.val)
    if train_set.classes != val_set.classes:
        raise InputError(
            "data.val",
            "class names that differ from those of data.train",
            "the same",
            "pack both with one list of classes",
        )
    folder = open_run(
        "e2vpt",
        "pretrain",
        runs_dir=cfg.run.runs_dir,
        name=cfg.run.name,
        resume=cfg.run.resume,
        overwrite=cfg.run.overwrite,
    )
    save_json(cfg, folder / "config.json")
    limit = cfg.data.limit or None
    train_x, train_y = train_set.pixels()[:limit], torch.tensor(train_set.labels)[:limit]
    val_x, val_y = val_set.pixels()[:limit], torch.tensor(val_set.labels)[:limit]
    if train_x.shape[-2:] != (IMG_SIZE, IMG_SIZE):
        raise InputError(
            "data.train",
            f"images of {tuple(train_x.shape[-2:])}",
            f"{IMG_SIZE}x{IMG_SIZE}",
            "resize them before packing",
        )
    num_classes = len(train_set.classes)

    network = build_micro_vit(
        num_classes,
        embed_dim=cfg.model.embed_dim,
        depth=cfg.model.depth,
        num_heads=cfg.model.embed_dim // 64,
    )
    if (
        fabric.device.type == "cpu"
    ):  # short sequences: plain softmax is twice as fast there in training
        for block in cast(Any, network).blocks:
            block.attn.fused_attn = False
    ema = ModelEmaV3(network, decay=cfg.optim.ema_decay, use_warmup=True, device=fabric.device)
    optimizer = build_optimizer(
        "adamw", network.named_parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
    )
    compiled: Any = torch.compile(network) if cfg.model.compile else network
    model, optimizer = fabric.setup(compiled, optimizer)

    steps_per_epoch = len(train_x) // cfg.data.batch_size
    total = steps_per_epoch * cfg.optim.epochs
    step, best = 0, 0.0
    if cfg.run.resume:
        state, warning = checkpoint.load_last(folder / "last.ckpt")
        network.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_rng_state(state["rng"])
        step, best = state["step"], state["best"]
    log = RunLog(folder, resume_step=step if cfg.run.resume else -1)
    if cfg.run.resume and warning:
        log.say(f"warning: {warning}")

    def state_now() -> dict[str, Any]:
        return {
            "model": network.state_dict(),
            "ema": ema.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": checkpoint.rng_state(),
            "step": step,
            "epoch": step // steps_per_epoch,
            "best": best,
            "config": to_dict(cfg),
        }

    model.train()
    scores: dict[str, float] = {}
    tick = time.perf_counter()
    try:
        with log.progress("pretrain", total, step) as bar:
            while step < total:
                epoch = step // steps_per_epoch
                order = torch.randperm(
                    len(train_x),
                    generator=torch.Generator().manual_seed(cfg.run.seed * 10_000 + epoch),
                )
                for batch in range(step % steps_per_epoch, steps_per_epoch):
                    chosen = order[batch * cfg.data.batch_size : (batch + 1) * cfg.data.batch_size]
                    lr = lr_at(
                        step,
                        schedule=cfg.optim.schedule,
                        peak=cfg.optim.lr,
                        steps_per_epoch=steps_per_epoch,
                        epochs=cfg.optim.epochs,
                        warmup_epochs=cfg.optim.warmup_epochs,
                    )
                    set_lr(optimizer, lr)
                    loss = train_step(
                        fabric, model, optimizer, train_x[chosen], train_y[chosen], cfg
                    )
                    ema.update(network, step=step)
                    step += 1
                    bar.tick(f"loss {loss:.3f}")
                    if step % LOG_EVERY == 0:
                        if not loss == loss:  # NaN
                            raise InputError(
                                "loss_ce",
                                f"nan at step {step}",
                                "a finite loss",
                                "lower optim.lr and --resume",
                            )
                        now = time.perf_counter()
                        log.log(
                            step,
                            epoch,
                            {
                                "loss_ce": loss,
                                "lr": lr,
                                "images_per_second": LOG_EVERY * cfg.data.batch_size / (now - tick),
                            },
                        )
                        tick = now
                    if step % SAVE_EVERY == 0:
                        checkpoint.save(state_now(), folder / "last.ckpt")
                scores = evaluate(fabric, ema.module, val_x, val_y, num_classes)
                log.log(step, epoch, {f"val_{k}": v for k, v in scores.items()})
                told = "  ".join(f"val_{name} {value:.4f}" for name, value in scores.items())
                log.say(f"epoch {epoch + 1}/{cfg.optim.epochs}  {told}")
                best = max(best, scores["top1"])
                checkpoint.save(state_now(), folder / "last.ckpt")
                tick = time.perf_counter()
    except KeyboardInterrupt:
        checkpoint.save(state_now(), folder / "last.ckpt")
        raise Interrupted(f"e2vpt pretrain --resume {folder}") from None
    export_backbone(ema.module, folder, cfg, train_set.classes, scores)
    plot_curves(folder, {"loss": ["loss_ce"], "accuracy": ["val_top1", "val_top5"], "rate": ["lr"]})
    write_result(
        folder,
        {
            "project": "e2vpt",
            "name": folder.name,
            "recipe": cfg.recipe,
            "seed": cfg.run.seed,
            "metrics": {f"val_{k}": v for k, v in scores.items()},
            "epochs": cfg.optim.epochs,
            "data": {
                "name": cfg.data.train.parent.name,
                "train_images": len(train_x),
                "val_images": len(val_x),
            },
            **run_facts(fabric),
        },
    )
    log.close()
    return folder


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
    import json

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
        "config": to_dict(cfg),
        "val": scores,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    checkpoint.write_text(json.dumps(card, indent=2) + "\n", folder / "model.json")
