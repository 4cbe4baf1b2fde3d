"""`dnc seg train`: mmengine's Runner on a config, and what our run folders have besides.

The loop is mmengine's; here the run folder is opened, processes and precision are chosen, the data
is looked at before anything starts, and the result and its pictures are written.
"""

import json
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmengine
import mmseg
import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import Runner

from dnc.devices import device_facts
from dnc.mmseg import checkpoints, drawing
from dnc.mmseg.config_files import load_config
from dnc.mmseg.folders import check_data
from dnc.mmseg.interrupts import saved_steps
from dnc.mmseg.precision import precision_of
from dnc.mmseg.segmentors import count_parameters, fractions
from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import open_run, plot_curves, write_result

CARD = "config.json"
CURVES = {"loss": ["loss", "decode.loss_ce"], "test": ["mIoU", "mAcc", "aAcc"], "lr": ["lr"]}
SHOWN = 8  # test images on the sheet of predictions
HOOKS = ("CentroidHook", "RandomStateHook", "PlainCheckpointHook")


@dataclass(frozen=True, kw_only=True)
class SegRun:
    """A training run as it was asked for; the fields of `dnc seg train`."""

    config: str = ""
    cfg_options: tuple[str, ...] = ()
    data_root: str = ""
    amp: bool = False
    launcher: str = "none"
    trusted: bool = False
    name: str = ""
    runs_dir: Path = Path("runs")
    resume: str = ""
    overwrite: bool = False
    seed: int = 0


def train(run: SegRun) -> Path:
    """Train, test once at the end, write the run folder.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    launcher = start_processes(run.launcher)
    if run.resume:
        cfg, seed = load_run(Path(run.resume), run.cfg_options, run.data_root)
    elif not run.config:
        raise InputError("config", "nothing", "a config first", "e.g. dnc seg train CONFIG")
    else:
        cfg, seed = load_config(Path(run.config), run.cfg_options, run.data_root), run.seed
    prepare(cfg, run, launcher, seed)
    check_data(cfg)
    folder = open_folder(run, cfg)
    cfg.work_dir = str(folder)
    for hook in cfg.custom_hooks:
        if hook["type"] == "InterruptHook":
            hook["command"] = f"dnc seg train --resume {shlex.quote(str(folder))}"
    if run.resume:
        cfg.load_from, cfg.resume = last_good(folder), True
    elif cfg.get("load_from"):
        path = str(cfg.load_from)
        trusted = run.trusted or path.startswith(checkpoints.TRUSTED)
        if "://" not in path:
            checkpoints.load(path, trusted=trusted)
            path = path.removeprefix(checkpoints.TRUSTED)
            cfg.load_from = checkpoints.TRUSTED * trusted + path
    runner = Runner.from_cfg(cfg)
    if is_main_process():
        write_card(folder, cfg, seed)
    parameters = count_parameters(bare_model(runner.model))
    runner.logger.info(
        f"{parameters['total']:,} parameters, {parameters['classifier']:,} of them in classifiers; "
        f"run folder {folder}"
    )
    try:
        runner.train()
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if saved_steps(folder):
            raise Interrupted(f"dnc seg train --resume {shlex.quote(str(folder))}") from None
        raise
    metrics = fractions(runner.test())
    if is_main_process():
        _write(folder, runner, cfg, seed, metrics, parameters)
    wait()
    return folder


def load_run(folder: Path, overrides: tuple[str, ...] = (), data_root: str = "") -> tuple[Any, int]:
    """Config and seed of a run folder.  Raises: MissingFileError, InputError."""
    with reading(folder / CARD, "the config.json of a run folder"):
        card = json.loads((folder / CARD).read_text())
        path, seed = folder / card["config"], int(card["seed"])
    return load_config(path, overrides, data_root), seed


def start_processes(launcher: str) -> str:
    """Join the other processes, if there are any; on a CPU mmengine itself could not."""
    if launcher == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        launcher = "pytorch"  # started by torchrun
    if launcher == "pytorch" and not torch.cuda.is_available():
        if "RANK" not in os.environ:
            raise InputError(
                "--launcher", "pytorch without RANK in the environment", "torchrun", "use NPROC=2"
            )
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
    return launcher


def prepare(cfg: Any, run: SegRun, launcher: str, seed: int) -> None:
    """Put launcher, precision, seed and our hooks into the config; in place."""
    cfg.launcher = launcher
    cfg.setdefault("randomness", {})
    cfg.randomness["seed"] = seed
    if not torch.cuda.is_available() and launcher != "none":
        # mmengine would name a GPU in device_ids.
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
        cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
    if run.amp:
        kind = cfg.optim_wrapper.get("type", "OptimWrapper")
        if kind == "OptimWrapper":
            on_gpu = torch.cuda.is_available()
            cfg.optim_wrapper["type"] = "AmpOptimWrapper" if on_gpu else "Bf16OptimWrapper"
            if on_gpu:
                cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
        elif "only_if_fast" in cfg.optim_wrapper:
            cfg.optim_wrapper["only_if_fast"] = False
    hooks = list(cfg.get("custom_hooks", []))
    known = {hook["type"] for hook in hooks}
    hooks += [{"type": name} for name in (*HOOKS, "InterruptHook") if name not in known]
    cfg.custom_hooks = hooks


def open_folder(run: SegRun, cfg: Any) -> Path:
    """The run folder, made by the first process and known to all."""
    found: list[Any] = [None]
    if is_main_process():
        name = Path(run.config).stem
        folder = open_run(
            "dnc",
            name,
            runs_dir=run.runs_dir,
            name=run.name,
            resume=run.resume,
            overwrite=run.overwrite,
        )
        if not run.resume:  # so that a run that stops early is known as one
            write_text(json.dumps({"config": _config_name(cfg), "seed": run.seed}), folder / CARD)
        found = [str(folder)]
    broadcast_object_list(found)
    return Path(found[0])


def _config_name(cfg: Any) -> str:
    return Path(cfg.filename).name if cfg.filename else "config.py"


def write_card(folder: Path, cfg: Any, seed: int) -> None:
    """The config that mmengine wrote, under which name, and the seed."""
    name = _config_name(cfg)
    cfg.dump(str(folder / name))
    card = {
        "config": name,
        "seed": seed,
        "resolved": json.loads(json.dumps(cfg.to_dict(), default=str)),
    }
    write_text(json.dumps(card, indent=1) + "\n", folder / CARD)


def last_good(folder: Path) -> str:
    """The latest checkpoint of a run that opens.  Raises: InputError where none does."""
    failure = InputError(
        "--resume", f"{folder} without a checkpoint", "one at least", "start again with --overwrite"
    )
    for path in saved_steps(folder):
        try:
            checkpoints.load(path)
        except InputError as error:
            failure = error
            logging.getLogger("mmengine").warning("%s; trying the one before", error)
        else:
            return str(path)
    raise failure


def bare_model(model: Any) -> Any:
    """Without the wrapper of several processes."""
    return getattr(model, "module", model)


def wait() -> None:
    """For the other processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _write(
    folder: Path,
    runner: Any,
    cfg: Any,
    seed: int,
    metrics: Mapping[str, float],
    parameters: Mapping[str, Any],
) -> None:
    """Curves, predictions, and last of all result.json."""
    rows = log_rows(folder)
    write_text("".join(json.dumps(row) + "\n" for row in rows), folder / "metrics.jsonl")
    plot_curves(folder, CURVES)
    draw_predictions(
        bare_model(runner.model), runner.test_dataloader.dataset, folder / "predictions.png"
    )
    steps = [row for row in rows if row.get("time")]
    rate = len(steps) / sum(row["time"] for row in steps) if steps else 0.0
    batch = cfg.train_dataloader.batch_size * runner.world_size
    device = next(runner.model.parameters()).device
    facts = device_facts(device, precision_of(runner.optim_wrapper), runner.world_size)
    facts["versions"] |= versions()
    count = len(runner.test_dataloader.dataset)
    write_result(
        folder,
        {
            "project": "dnc",
            "name": folder.name,
            "recipe": Path(cfg.filename).stem,
            "method": cfg.model.decode_head.type,
            "seed": seed,
            "metrics": {name: metrics[name] for name in ("mIoU", "aAcc", "mAcc")},
            "parameters": parameters,
            "data": {
                "name": cfg.test_dataloader.dataset.type,
                "train_images": len(runner.train_dataloader.dataset),
                "val_images": len(runner.val_dataloader.dataset) if runner.val_loop else 0,
                "test_images": count,
            },
            "epochs": runner.epoch,
            "iterations": runner.iter,
            "images_per_second": rate * batch,
            **facts,
        },
    )


def versions() -> dict[str, str]:
    """Of what segmentation needs besides."""
    return {"mmengine": mmengine.__version__, "mmseg": mmseg.__version__}


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """What mmengine logged, over all sessions of a run, as the lines of metrics.jsonl."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            step = int(row.pop("step", row.get("iter", 0)))
            rows[step, "mIoU" in row] = {"step": step, "epoch": int(row.pop("epoch", 0)), **row}
    return [rows[key] for key in sorted(rows)]


@torch.no_grad()
def draw_predictions(model: Any, dataset: Any, path: Path, count: int = SHOWN) -> None:
    """Image, truth and prediction of the first images of a data set."""
    model.eval()
    palette = dataset.metainfo["palette"]
    rows = []
    for i in range(min(count, len(dataset))):
        sample = model.test_step(pseudo_collate([dataset[i]]))[0]
        found = sample.pred_sem_seg.data[0].cpu().numpy()
        image = drawing.read_rgb(sample.img_path, found.shape)
        truth = sample.gt_sem_seg.data[0].cpu().numpy()
        truth = drawing.colours(truth, palette)
        rows.append(
            [image, truth, drawing.colours(found, palette), drawing.overlay(image, found, palette)]
        )
    drawing.sheet(rows, ("image", "truth", "prediction", "overlay"), path)
