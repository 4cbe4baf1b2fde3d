"""`dnc seg fit`: a trained softmax segmentor becomes a nearest-centroid one, without training.

One pass over the training images: pixel features of each class are clustered, and the weights stay
as they are but for the classifier, which is taken away.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from torch import Tensor

from dnc.devices import device_facts
from dnc.fitter import CentroidFitter
from dnc.mmseg import checkpoints
from dnc.mmseg.config_files import load_config, num_classes_of, training_images_to_look_at
from dnc.mmseg.folders import check_data
from dnc.mmseg.heads import labels_at
from dnc.mmseg.owners import centroid_heads
from dnc.mmseg.segmentors import build_segmentor, count_parameters, load_into, measure
from dnc.mmseg.train import draw_predictions, versions, write_card
from shared_utils import checkpoint
from shared_utils.errors import InputError
from shared_utils.run_log import RunLog, open_run, write_result
from shared_utils.seeding import seed_all

WITH_CENTROIDS = {
    "FCNHead": "DNCFCNHead",
    "LayerNormFCNHead": "DNCFCNHead",
    "ASPPHead": "DNCASPPHead",
    "DepthwiseSeparableASPPHead": "DNCDepthwiseSeparableASPPHead",
    "UPerHead": "DNCUPerHead",
    "SegformerHead": "DNCSegformerHead",
}
NUM_CENTROIDS = 50  # where nothing follows the decision the clusters have to be finer
PER_CLASS = 16  # pixels of a class taken from one image, so that one image does not rule
AT_EDGES = 0.9  # share of them that lie at another class, where it is decided which one wins
NUM_FIRST = 512  # pixels that a class is first clustered from
NAME = "fit.pth"


def with_centroids(cfg: Any, num_centroids: int | None = None) -> Any:
    """The config with sub-centroids in place of its decoder's softmax classifier; in place.

    Raises: InputError for a decoder that has no counterpart.
    """
    num_classes_of(cfg)
    head = cfg.model.decode_head
    if head.type not in WITH_CENTROIDS.values():
        if head.type not in WITH_CENTROIDS:
            raise InputError(
                "model.decode_head.type", head.type, ", ".join(WITH_CENTROIDS), "fit one of these"
            )
        if head.type == "LayerNormFCNHead":
            head.embed_norm = True
        head.type = WITH_CENTROIDS[head.type]
        head.num_centroids = NUM_CENTROIDS
    if num_centroids is not None:
        head.num_centroids = num_centroids
    imports = cfg.setdefault("custom_imports", {"imports": [], "allow_failed_imports": False})
    if "dnc.mmseg" not in imports["imports"]:
        imports["imports"] = [*imports["imports"], "dnc.mmseg"]
    return cfg


@torch.no_grad()
def fit(
    config: Path,
    weights: Path,
    *,
    num_centroids: int | None = None,
    overrides: Sequence[str] = (),
    data_root: str = "",
    trusted: bool = False,
    name: str = "",
    runs_dir: Path = Path("runs"),
    overwrite: bool = False,
    seed: int = 0,
) -> Path:
    """One pass over the training images and one test; writes the run folder.

    Args:
        config: that of the softmax segmentor, or one with sub-centroids for the same network.
        weights: its checkpoint.
        num_centroids: K; None: the config's, or 50 where that is of a softmax segmentor.
        overrides: settings of the config to change.
        data_root: of all data sets.
        trusted: open a checkpoint that is more than tensors and plain data.
        name: of the run folder.
        runs_dir: folder of the runs.
        overwrite: empty an existing run folder.
        seed: of the pixels that are drawn.

    Raises: MissingFileError; InputError where config, checkpoint and data do not fit.
    """
    cfg = with_centroids(load_config(config, overrides, data_root), num_centroids)
    check_data(cfg)
    seed_all(seed)
    model = build_segmentor(cfg)
    report = load_into(model, checkpoints.state_dict_of(checkpoints.load(weights, trusted=trusted)))
    # A new LayerNorm begins as a plain one, which is right for features that are only clustered.
    new = (".classifier.", ".embed_norm.")
    missing = [name for name in report.missing if not any(part in name for part in new)]
    if missing or report.odd:
        first = (missing + list(report.odd))[0]
        raise InputError(
            str(weights),
            f"{'no' if missing else 'another shape of'} {first} ({report})",
            "the weights of the config's model",
            "give the config it was trained with",
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    folder = open_run(
        "dnc", f"fit-{config.stem}", runs_dir=runs_dir, name=name, overwrite=overwrite
    )
    cfg.work_dir = str(folder)
    write_card(folder, cfg, seed)
    log = RunLog(folder)
    log.say(f"run folder {folder}; {report}")
    begun = time.perf_counter()
    dataset = DATASETS.build(training_images_to_look_at(cfg))
    fit_centroids(model, dataset, log=log)
    seconds = time.perf_counter() - begun
    checkpoint.save(
        {"meta": {"fitted_from": str(weights)}, "state_dict": model.state_dict()}, folder / NAME
    )
    metrics = measure(cfg, model)
    log.log(0, 0, {**metrics, "images_per_second": len(dataset) / seconds})
    log.close()
    tests = DATASETS.build(cfg.test_dataloader.dataset)
    draw_predictions(model, tests, folder / "predictions.png")
    facts = device_facts(next(model.parameters()).device, "32-true", 1)
    facts["versions"] |= versions()
    write_result(
        folder,
        {
            "project": "dnc",
            "name": folder.name,
            "recipe": config.stem,
            "method": "fit",
            "seed": seed,
            "metrics": {key: metrics[key] for key in ("mIoU", "aAcc", "mAcc")},
            "parameters": {**count_parameters(model), "tuned": 0, "percent": 0.0},
            "data": {
                "name": cfg.test_dataloader.dataset.type,
                "train_images": len(dataset),
                "val_images": 0,
                "test_images": len(tests),
            },
            "epochs": 0,
            "images_per_second": len(dataset) / seconds,
            **facts,
        },
    )
    log.say("  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return folder


@torch.no_grad()
def fit_centroids(model: Any, dataset: Any, log: RunLog | None = None) -> None:
    """Set the sub-centroids of a model's decoders from pixel features of a data set; in place.

    Raises: InputError where a class has no pixel.
    """
    heads = centroid_heads(model)
    fitters: dict[str, CentroidFitter] = {}
    for name, head in heads:
        own = head.classifier
        fitters[name] = CentroidFitter(
            own.num_classes, own.embed_dim, own.num_centroids,
            num_first=NUM_FIRST, device=own.centroids.device,
        )  # fmt: skip
    for place in range(len(dataset)):
        features, labels = pixel_features(model, dataset[place])
        for name, head in heads:
            decoder: Any = head
            align = bool(decoder.align_corners)
            grid = labels_at(labels, *features[name].shape[2:], align_corners=align)
            rows, own_labels = drawn(features[name], grid, head.classifier.ignore_index)
            fitters[name].add(rows, own_labels)
        if log is not None and (place + 1) % 200 == 0:
            log.say(f"fit {place + 1}/{len(dataset)} images")
    for name, head in heads:
        points, active = fitters[name].finish()
        head.classifier.centroids.copy_(points)
        head.classifier.active.copy_(active)
        head.classifier.seeded.copy_(active)


@torch.no_grad()
def pixel_features(model: Any, item: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What the classifiers of a model are given for one image of a data set.

    Returns: features (1, D, h, w) of each decoder with sub-centroids, and labels (1, H, W).
    """
    data = model.data_preprocessor(pseudo_collate([item]), False)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given: found.__setitem__(name, given[0])

    hooks = [
        head.classifier.register_forward_pre_hook(keep(name))
        for name, head in centroid_heads(model)
    ]
    try:
        maps = model.extract_feat(data["inputs"])
        for _, head in centroid_heads(model):
            head(maps)
    finally:
        for hook in hooks:
            hook.remove()
    labels = data["data_samples"][0].gt_sem_seg.data.to(data["inputs"].device).long()
    return found, labels


def drawn(features: Tensor, grid: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """At most `PER_CLASS` pixels of each class, drawn at random, edges first: (n, D) and (n,)."""
    own = (grid != ignored).nonzero()
    own = own[torch.randperm(len(own), device=own.device)]
    labels = grid[own[:, 0], own[:, 1], own[:, 2]]
    is_edge = edges(grid, ignored)[own[:, 0], own[:, 1], own[:, 2]]
    # Of each class as many edges as are wanted, then the rest, then the edges beyond.
    rank = (~is_edge).long()
    rank[is_edge & (_turns(labels, is_edge) >= round(AT_EDGES * PER_CLASS))] = 2
    order = rank.argsort(stable=True)
    own, labels = own[order], labels[order]
    everything = torch.ones_like(labels, dtype=torch.bool)
    chosen = _turns(labels, everything) < PER_CLASS
    n, y, x = own[chosen].unbind(1)
    return features[n, :, y, x], labels[chosen]


def edges(grid: Tensor, ignored: int) -> Tensor:
    """Which of the labels (N, h, w) lie beside, above, below or across from another class."""
    result = torch.zeros_like(grid, dtype=torch.bool)
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        height, width = grid.shape[1] - down, grid.shape[2] - abs(across)
        left = max(0, -across)
        here = (slice(None), slice(height), slice(left, left + width))
        there = (slice(None), slice(down, None), slice(left + across, left + across + width))
        differ = (grid[here] != grid[there]) & (grid[here] != ignored) & (grid[there] != ignored)
        result[here] |= differ
        result[there] |= differ
    return result


def _turns(labels: Tensor, counted: Tensor) -> Tensor:
    """How many that count come before each one of its label."""
    order = labels.argsort(stable=True)
    sums = counted[order].long().cumsum(0) - counted[order].long()
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[order]]
    result = torch.empty_like(sums)
    result[order] = sums - sums[first]
    return result
