"""The metrics that two projects share, thin on torchmetrics.

torchmetrics adds counts over batches and processes and divides once at the end.
"""

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def classification_metrics(num_classes: int) -> MetricCollection:
    """`top1` and, from six classes on, `top5`, each a fraction in [0, 1] over all samples (micro).

    Feed with logits (B, C) and int64 targets (B,); `compute()` gives a dict of scalars.
    """
    ks = (1, 5) if num_classes > 5 else (1,)  # top-5 of five classes says nothing
    return MetricCollection({f"top{k}": MulticlassAccuracy(num_classes, k, "micro") for k in ks})
