"""Devices, precision and processes of a run, on Lightning Fabric."""

import logging
import os
import platform
from typing import Any

import timm
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from e2vpt.config import RunConfig
from shared_utils.errors import InputError


def launch_fabric(run: RunConfig) -> Fabric:
    """Devices, precision and processes of a run; under torchrun their count is the launcher's.

    Raises: InputError where this machine does not have them.
    """
    # It says on stderr which precision it uses; result.json says that, and stderr is for errors.
    # Its messages come from either logger, as the one imported last has it.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        fabric = Fabric(
            accelerator=run.accelerator,
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", run.devices)),
            num_nodes=run.num_nodes,
            precision=run.precision,
        )
    except (RuntimeError, MisconfigurationException) as error:
        raise InputError(
            "accelerator and devices",
            f"{run.accelerator} and {run.devices} ({str(error).rstrip('.!')})",
            "what this machine has",
            "leave them out",
        ) from error
    fabric.launch()
    return fabric


def run_facts(fabric: Fabric) -> dict[str, Any]:
    """The part of `result.json` that says what it ran on."""
    if fabric.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(fabric.device)
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_memory_bytes": int(memory),
        "device": torch.cuda.get_device_name(fabric.device)
        if fabric.device.type == "cuda"
        else "cpu",
        "precision": str(fabric._precision.precision),
        "processes": fabric.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }
