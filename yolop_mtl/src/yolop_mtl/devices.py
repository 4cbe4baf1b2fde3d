"""Devices, precision and processes of a run, on Lightning Fabric."""

import logging
import os
import platform
import resource
from typing import Any

import torch
import torchvision
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from shared_utils.errors import InputError
from yolop_mtl.config import RunConfig


def launch_fabric(run: RunConfig) -> Fabric:
    """What a run is computed on; under torchrun the number of processes is the launcher's.

    Raises: InputError where this machine does not have it.
    """
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # stderr is for errors
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", run.devices))
    options: dict[str, Any] = {}
    if devices * run.num_nodes > 1:
        # Running statistics are shared once an epoch, see train.py.
        options["strategy"] = DDPStrategy(broadcast_buffers=False)
    try:
        fabric = Fabric(
            accelerator=run.accelerator,
            devices=devices,
            num_nodes=run.num_nodes,
            precision=run.precision,
            **options,
        )
    except (RuntimeError, MisconfigurationException) as error:
        raise InputError(
            "accelerator and devices",
            f"{run.accelerator} and {devices} ({str(error).rstrip('.!')})",
            "what this machine has",
            "leave them out",
        ) from error
    fabric.launch()
    return fabric


def run_facts(fabric: Fabric) -> dict[str, Any]:
    """The part of `result.json` that says what it ran on."""
    is_gpu = fabric.device.type == "cuda"
    if is_gpu:
        memory = torch.cuda.max_memory_allocated(fabric.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_memory_bytes": int(memory),
        "device": torch.cuda.get_device_name(fabric.device) if is_gpu else "cpu",
        "precision": str(fabric._precision.precision),
        "processes": fabric.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
