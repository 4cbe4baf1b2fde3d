"""A detector from a config to its run folder: mmengine's Runner, then the test set's COCO AP."""

import shlex
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmengine.dist import is_main_process
from mmengine.runner import Runner

import dnc.mmdet  # noqa: F401  registers what configs name
from dnc.devices import device_facts
from dnc.mmseg import checkpoints
from dnc.mmseg.config_files import load_config
from dnc.mmseg.precision import precision_of
from dnc.mmseg.segmentors import count_parameters
from dnc.mmseg.train import (
    SegRun,
    bare_model,
    last_good,
    load_run,
    open_folder,
    prepare,
    start_processes,
    versions,
    wait,
    write_card,
)  # fmt: skip
from shared_utils.errors import InputError
from shared_utils.run_log import write_result

NAMES = {"mAP": "coco/bbox_mAP", "mAP50": "coco/bbox_mAP_50", "mAP75": "coco/bbox_mAP_75"}
COMMAND = "python -m dnc.mmdet"


def train(run: SegRun) -> Path:
    """Train, test once at the end, write the run folder.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    if run.amp and not torch.cuda.is_available():
        expected = "a GPU: on a CPU the suppression of mmcv takes scores of 32 bits alone"
        raise InputError("amp", "True without a GPU", expected, "leave it out")
    launcher = start_processes(run.launcher)
    if run.resume:
        cfg, seed = load_run(Path(run.resume), run.cfg_options, run.data_root)
    else:
        cfg, seed = load_config(Path(run.config), run.cfg_options, run.data_root), run.seed
    prepare(cfg, run, launcher, seed)
    folder = open_folder(run, cfg)
    cfg.work_dir = str(folder)
    for hook in cfg.custom_hooks:
        if hook["type"] == "InterruptHook":
            hook["command"] = f"{COMMAND} --resume {shlex.quote(str(folder))}"
    if run.resume:
        cfg.load_from, cfg.resume = last_good(folder), True
    elif cfg.get("load_from") and "://" not in str(cfg.load_from):
        checkpoints.load(str(cfg.load_from), trusted=run.trusted)
    runner = Runner.from_cfg(cfg)
    if is_main_process():
        write_card(folder, cfg, seed)
    runner.train()
    found = runner.test()
    if is_main_process():
        metrics = {name: float(found[key]) for name, key in NAMES.items()}
        _write(folder, runner, cfg, seed, metrics)
    wait()
    return folder


def _write(folder: Path, runner: Any, cfg: Any, seed: int, metrics: dict[str, float]) -> None:
    model = bare_model(runner.model)
    device = next(model.parameters()).device
    facts = device_facts(device, precision_of(runner.optim_wrapper), runner.world_size)
    facts["versions"] |= versions() | {"mmdet": mmdet.__version__}
    write_result(
        folder,
        {
            "project": "dnc",
            "name": folder.name,
            "recipe": Path(cfg.filename).stem,
            "method": cfg.model.roi_head.bbox_head.type,
            "seed": seed,
            "metrics": metrics,
            "parameters": count_parameters(model),
            "data": {
                "name": cfg.test_dataloader.dataset.type,
                "train_images": len(runner.train_dataloader.dataset),
                "val_images": len(runner.val_dataloader.dataset),
                "test_images": len(runner.test_dataloader.dataset),
            },
            "epochs": runner.epoch,
            "iterations": runner.iter,
            **facts,
        },
    )
