"""mmengine's config files, with what the command line changes in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

import dnc.mmseg  # noqa: F401  registers what configs name
from shared_utils.errors import InputError, MissingFileError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def load_config(path: Path, overrides: Sequence[str] = (), data_root: str = "") -> Any:
    """Read a config and put overrides into it.

    Args:
        path: the file.
        overrides: `key.of.it=value`, as mmengine's `--cfg-options`.
        data_root: of all data sets, in place of theirs.

    Raises: MissingFileError; InputError where it is no config or an override is none.
    """
    if not path.is_file():
        raise MissingFileError(str(path), "no such file", "a config of mmengine", "check the path")
    try:
        cfg = Config.fromfile(str(path))
    except (SyntaxError, OSError, KeyError, NameError, ImportError) as error:
        raise InputError(
            str(path), f"{type(error).__name__} ({error})", "a config of mmengine", "correct it"
        ) from error
    changes = {}
    for word in overrides:
        key, is_pair, value = word.partition("=")
        if not is_pair or not key:
            raise InputError("--cfg-options", word, "KEY=VALUE", "e.g. train_cfg.max_iters=100")
        changes[key] = DictAction._parse_iterable(value)
    try:
        cfg.merge_from_dict(changes)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            "--cfg-options", " ".join(overrides), "keys that fit the config", str(error)
        ) from error
    if data_root:
        for _, dataset in dataset_configs(cfg):
            dataset.data_root = data_root
    init_default_scope(cfg.get("default_scope", "mmseg"))
    return cfg


def dataset_configs(cfg: Any) -> Iterator[tuple[str, Any]]:
    """Each data set of a config and the loader that it belongs to; wrapped ones unwrapped."""
    for loader in LOADERS:
        waiting = [cfg.get(loader, {}).get("dataset")] if cfg.get(loader) else []
        while waiting:
            dataset = waiting.pop(0)
            if dataset is None:
                continue
            inner = dataset.get("datasets") or [dataset.get("dataset")]
            if any(part is not None for part in inner):
                waiting += inner
            else:
                yield loader, dataset


def training_images_to_look_at(cfg: Any) -> Any:
    """The config of the training set with the pipeline of tests, labels included."""
    dataset = cfg.train_dataloader.dataset.copy()
    while dataset.get("dataset") is not None:  # a wrapper that repeats it
        dataset = dataset.dataset.copy()
    pipeline = [step.copy() for step in cfg.test_dataloader.dataset.pipeline]
    if not any(step["type"] == "LoadAnnotations" for step in pipeline):
        loading = [s.copy() for s in dataset.pipeline if s["type"] == "LoadAnnotations"]
        pipeline[-1:-1] = loading
    dataset.pipeline = pipeline
    return dataset


def image_pipeline(cfg: Any) -> Any:
    """The pipeline of tests without labels: `dict(img_path=...)` -> inputs and a data sample."""
    steps = [
        s.copy() for s in cfg.test_dataloader.dataset.pipeline if s["type"] != "LoadAnnotations"
    ]
    return Compose(steps)


def num_classes_of(cfg: Any) -> int:
    """Of the decoder.  Raises: InputError where there is not one decoder that says it."""
    head = cfg.model.get("decode_head")
    if not isinstance(head, dict) or "num_classes" not in head:
        raise InputError(
            "model.decode_head", type(head).__name__, "one decoder with num_classes", "name it"
        )
    return int(head["num_classes"])
