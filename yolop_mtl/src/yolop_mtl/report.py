"""The last files of a run: curves, pictures and `result.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from shared_utils.run_log import plot_curves, write_result
from yolop_mtl import model_io, pictures
from yolop_mtl.assemble import Splits
from yolop_mtl.config import TrainConfig
from yolop_mtl.curves import draw_box_curves, draw_lane_curve
from yolop_mtl.dataset import DrivingDataset
from yolop_mtl.devices import run_facts
from yolop_mtl.evaluate import Evaluation

CURVES = {
    "loss": ["loss"],
    "boxes": ["loss_box", "loss_obj", "loss_cls"],
    "masks": ["loss_drivable", "loss_lane_focal", "loss_lane_dice", "loss_lane_iou"],
    "box figures": ["mAP50", "mAP50_95", "precision", "recall"],
    "mask figures": ["drivable_mIoU", "lane_IoU", "lane_accuracy", "lane_f1", "fitness"],
}
TOLD = ("mAP50", "mAP50_95", "drivable_mIoU", "lane_IoU", "lane_f1", "fitness")


def say_metrics(metrics: Mapping[str, float]) -> str:
    """The figures to follow a run by, in one line."""
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in TOLD if name in metrics)


def write_curves(found: Evaluation, class_names: Sequence[str], folder: Path) -> None:
    """Boxes over confidence and recall, lanes over their threshold, of the best network so far."""
    if found.boxes is not None:
        draw_box_curves(found.boxes, class_names, folder / "boxes.png")
    if found.lane is not None:
        draw_lane_curve(found.lane, folder / "lanes.png")


def write_report(
    cfg: TrainConfig,
    fabric: Fabric,
    folder: Path,
    splits: Splits,
    metrics: Mapping[str, float],
    *,
    epochs: int,
    images_per_second: float,
) -> None:
    """Curves, predictions of the best network, and last of all result.json."""
    plot_curves(folder, CURVES)
    deployed = model_io.load(folder)
    val = DrivingDataset(
        splits.val, cfg.data, tasks=cfg.model.tasks, augment=None, seed=cfg.run.seed
    )
    pictures.predictions(
        deployed.model.to(fabric.device),
        val,
        splits.class_names,
        folder / "predictions.png",
        device=fabric.device,
        autocast=fabric.autocast,
    )
    total = sum(p.numel() for p in deployed.model.parameters())
    tuned = sum(
        p.numel()
        for name, p in deployed.model.named_parameters()
        if not name.startswith(tuple(f"{part}." for part in cfg.optim.freeze))
    )
    write_result(
        folder,
        {
            "project": "yolop_mtl",
            "name": folder.name,
            "recipe": cfg.recipe,
            "seed": cfg.run.seed,
            "metrics": dict(metrics),
            "parameters": {"tuned": tuned, "total": total, "percent": 100 * tuned / total},
            "data": {
                "name": cfg.data.root.name,
                "train_images": len(splits.train),
                "val_images": len(splits.val),
                "test_images": 0,
            },
            "epochs": epochs,
            "images_per_second": images_per_second,
            **run_facts(fabric),
        },
    )


def write_train_batch(dataset: Any, folder: Path, class_names: tuple[str, ...], count: int) -> None:
    """The first images of the first epoch, augmented, with their labels."""
    count = min(count, pictures.NUM_TRAIN, len(dataset))
    items = [dataset[index] for index in range(count)]
    pictures.train_images(items, class_names, folder / "train_images.png")
