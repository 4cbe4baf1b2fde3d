"""`dnc fit`: a trained network becomes a classifier in a run folder, without training."""

import time
from pathlib import Path
from typing import Any

import torch

from dnc import model_io, pictures
from dnc.config import TrainConfig
from dnc.data import build_loader, load_data
from dnc.deployed import Deployed, Network
from dnc.devices import launch_fabric, run_facts
from dnc.encoders import build_encoder
from dnc.fit import fitted_head
from dnc.fit_config import FitConfig
from shared_utils.config import load_json, save_json
from shared_utils.errors import InputError
from shared_utils.run_log import RunLog, open_run, write_result
from shared_utils.seeding import seed_all


def fit_run(cfg: FitConfig) -> Path:
    """One pass over the training images, anchors, one test; writes the run folder.

    Raises: InputError for what the user can mend.
    """
    if cfg.run.resume:
        raise InputError("resume", cfg.run.resume, "nothing", "fit again: it takes one pass")
    fabric = launch_fabric(cfg.run)
    if fabric.world_size > 1:
        raise InputError("processes", fabric.world_size, "1", "fit with one process")
    seed_all(cfg.run.seed)
    splits = load_data(cfg.data, seed=cfg.run.seed)
    encoder = _encoder(cfg).to(fabric.device).eval()
    folder = open_run(
        "dnc",
        f"fit-{cfg.recipe}",
        runs_dir=cfg.run.runs_dir,
        name=cfg.run.name,
        overwrite=cfg.run.overwrite,
    )
    save_json(cfg, folder / "config.json")
    log = RunLog(folder)
    log.say(f"run folder {folder}")
    begun = time.perf_counter()
    loader: Any = build_loader(splits.train.plain(), cfg.data, train=False)
    with fabric.autocast():
        head = fitted_head(
            encoder,
            loader,
            splits.num_classes,
            cfg.model.num_centroids,
            temperature=cfg.model.temperature,
        )
    seconds = time.perf_counter() - begun
    deployed = Deployed(cfg, fabric, Network(encoder, head), splits)
    extra = deployed.finish()
    scores = deployed.scores("val", splits.val) | deployed.scores("test", splits.test)
    log.log(0, 0, {**scores, "images_per_second": len(splits.train) / seconds})
    log.close()
    classifier = deployed.classifier
    model_io.save(classifier, folder, cfg.model, cfg.data)
    if classifier.anchors is not None:
        pictures.anchors(
            classifier.anchors, splits.train, splits.class_names, folder / "anchors.png"
        )
    total = sum(p.numel() for p in encoder.parameters())
    write_result(
        folder,
        {
            "project": "dnc",
            "name": folder.name,
            "recipe": cfg.recipe,
            "method": "fit",
            "seed": cfg.run.seed,
            "metrics": {name: value for name, value in scores.items() if "_top" in name},
            **extra,
            "parameters": {"tuned": 0, "total": total, "percent": 0.0, "classifier": 0},
            "data": splits.summary(),
            "epochs": 0,
            "images_per_second": len(splits.train) / seconds,
            **run_facts(fabric),
        },
    )
    log.say("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return folder


def _encoder(cfg: FitConfig) -> torch.nn.Module:
    if not cfg.fit.run:
        return build_encoder(
            cfg.model.encoder,
            img_size=cfg.data.img_size,
            stem=cfg.model.stem,
            pretrained=True,
            embed_norm=cfg.model.embed_norm,
        )
    before = load_json(TrainConfig, Path(cfg.fit.run) / "config.json")
    for name in ("encoder", "stem", "embed_norm"):
        own, theirs = getattr(cfg.model, name), getattr(before.model, name)
        if own != theirs:
            raise InputError(
                f"model.{name}", own, f"{theirs}, that of {cfg.fit.run}", "give the same"
            )
    return model_io.load(Path(cfg.fit.run)).encoder
