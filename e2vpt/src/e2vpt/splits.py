"""Which images train, validate and test, the same ones in every run.

NumPy's `RandomState` draws them because its stream is fixed for good, unlike newer generators'.
"""

from collections.abc import Sequence

import numpy as np

from e2vpt.config import DataConfig
from e2vpt.readers import Pool, Source
from shared_utils.errors import InputError

SPLIT_SEED = 0


def split_source(source: Source, cfg: DataConfig) -> dict[str, Pool]:
    """The pools by split name: train, and val and test where there are any.

    A source with its own training and validation images keeps them. Otherwise validation images
    are drawn from the training images: `num_val` (0: a fifth, rounded down), and `num_train` of the
    others train (0: all). A source without any split also gets a test split: with `num_train` all
    that the other two leave (none: no test split); without it a fifth of the images is drawn for
    the test and the rest trains. All draws follow `balanced_order` with its fixed seed; within a
    split the images keep the source's order.

    With `train_on_val` the images so chosen for training and validation train together, and there
    is no validation. Where the source lists both together itself (train800val200.txt of VTAB-1k),
    that list is used.

    Raises:
        InputError: counts given for a source that has its own splits, or that leave a split empty.
    """
    pools = {"train": source.train, "val": source.val, "test": source.test}
    if source.val is not None:
        for field in ("num_train", "num_val"):
            if getattr(cfg, field):
                raise InputError(
                    f"data.{field}",
                    getattr(cfg, field),
                    f"0, as '{cfg.source}' has training and validation images of its own",
                    "leave it out or use --data.limit",
                )
    else:
        total = len(source.train)
        fifth = max(1, total // 5)
        num_val = cfg.num_val or fifth
        num_test = 0 if source.is_split or cfg.num_train else fifth
        num_train = cfg.num_train or total - num_val - num_test
        if num_train < 1 or num_train + num_val > total:
            raise InputError(
                "data.num_train and data.num_val",
                f"{cfg.num_train} and {cfg.num_val}",
                f"at most {total} in all, the images of '{cfg.source}', and some left to train",
                "lower them or add images",
            )
        order = balanced_order(source.train.labels)
        end = num_train + num_val
        pools["train"] = source.train.take(sorted(order[:num_train]))
        pools["val"] = source.train.take(sorted(order[num_train:end]))
        if not source.is_split and end < total:
            pools["test"] = source.train.take(sorted(order[end:]))
    if cfg.train_on_val and pools["train"] is not None and pools["val"] is not None:
        pools["train"] = source.train_val or pools["train"].joined(pools["val"])
        pools["val"] = None
    return {split: pool for split, pool in pools.items() if pool is not None}


def balanced_order(labels: Sequence[int], seed: int = SPLIT_SEED) -> list[int]:
    """A random order in which every beginning holds the classes in their proportions.

    The first C of it are one image of each of the C classes. Made as follows: permute with
    `numpy.random.RandomState(seed)`, number the images of each class 0, 1, ... in that order, and
    sort stably by number / size of the class.
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    sizes = np.bincount(labels)
    seen = np.zeros(len(sizes), dtype=np.int64)
    share = np.empty(len(labels))
    for place, index in enumerate(order):
        label = labels[index]
        share[place] = seen[label] / sizes[label]
        seen[label] += 1
    chosen: list[int] = order[np.argsort(share, kind="stable")].tolist()
    return chosen


def limited(pool: Pool, limit: int) -> Pool:
    """At most `limit` images, classes in their proportions, order kept; always the same ones."""
    if len(pool) <= limit:
        return pool
    return pool.take(sorted(balanced_order(pool.labels)[:limit]))
