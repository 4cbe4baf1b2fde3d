"""Figures of a network on a set: right where it is right, and the same however they are made."""

import math

import numpy as np
import pytest
import torch

import yolop_mtl
from yolop_mtl.config import DataConfig
from yolop_mtl.evaluate import Evaluation, evaluate, summarize

from .known_network import SIZE, KnownNetwork, autocast, batches, outputs, truths

DATA = DataConfig(img_size=SIZE)
NAMES = ("car", "truck")
PROMISED = {
    "mAP50", "mAP50_95", "precision", "recall", "drivable_mIoU", "lane_IoU", "lane_accuracy",
    "lane_f1",
}  # fmt: skip


def run(network: torch.nn.Module, loader: object, **options: object) -> Evaluation:
    settings = {"class_names": NAMES, "data": DATA, "device": "cpu", "autocast": autocast}
    return evaluate(network, loader, **(settings | options))


def strict(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("legacy_")}


def test_a_network_that_is_right_has_ones() -> None:
    samples = truths()
    metrics = run(KnownNetwork(outputs(samples, noise=0)), batches(samples, 3)).metrics
    ones = {name: metrics[name] for name in PROMISED}
    assert ones == pytest.approx(dict.fromkeys(PROMISED, 1.0))
    assert metrics["lane_tolerant_IoU"] == 1
    assert metrics["legacy_mAP50"] == pytest.approx(1)
    assert metrics["legacy_recall"] == 1
    assert "legacy_lane_f1" not in metrics
    # Legacy truth is wider than what nearest gives, so no network is right by both.
    assert metrics["legacy_lane_accuracy"] < 1


def test_a_network_that_is_wrong_everywhere_has_zeros() -> None:
    samples = truths()
    wrong = outputs(samples, noise=0)
    for output in wrong:
        output["drivable"], output["lane"] = -output["drivable"], -output["lane"]
        for x in output["detection"]:
            x.fill_(-20)
    metrics = run(KnownNetwork(wrong), batches(samples, 3)).metrics
    assert {name: metrics[name] for name in PROMISED} == dict.fromkeys(PROMISED, 0.0)


def test_strict_figures_depend_on_no_batch_no_order_and_no_process() -> None:
    samples = truths()
    network = KnownNetwork(outputs(samples, noise=0.6))
    first = run(network, batches(samples, 1))
    assert 0.1 < first.metrics["mAP50"] < 0.95
    assert 0.1 < first.metrics["lane_IoU"] < 0.95
    for size, order in ((3, range(7)), (7, range(7)), (2, [6, 2, 0, 5, 1, 4, 3])):
        again = run(network, batches(samples, size, order))
        assert again.metrics == first.metrics
    # Three processes; the second has an image of the first again, as a padded share would.
    parts = ([0, 3, 6], [1, 4, 0], [2, 5])
    kept = [run(network, batches(samples, 2, part)).images for part in parts]  # each in order
    for rank, part in enumerate(parts):
        sent = []

        def gather(own: object, sent: list[object] = sent) -> list[object]:
            sent.append(own)
            return list(kept)

        joined = run(network, batches(samples, 2, part), gather=gather)
        assert joined.metrics == first.metrics
        assert [image.number for image in joined.images] == list(range(7))
        assert [image.number for image in sent[0]] == parts[rank]


def test_legacy_figures_depend_on_the_order_of_the_set() -> None:
    # 34 images: a batch of 32 and one of 2. The same images in another order of the set differ.
    samples = truths()
    network = KnownNetwork(outputs(samples, noise=0.6))
    images = run(network, batches(samples, 4)).images
    usual = [images[0]] * 32 + [images[3]] * 2
    other = [images[3]] * 2 + [images[0]] * 32
    assert strict(summarize(usual, 2).metrics) == pytest.approx(strict(summarize(other, 2).metrics))
    names = ("legacy_drivable_mIoU", "legacy_lane_IoU")
    for name in names:
        found = (summarize(usual, 2).metrics[name], summarize(other, 2).metrics[name])
        assert abs(found[0] - found[1]) > 1e-6


def test_what_is_off_or_not_labelled_is_absent() -> None:
    samples = truths()
    lanes_only = [{"lane": output["lane"]} for output in outputs(samples, noise=0.2)]
    metrics = run(KnownNetwork(lanes_only), batches(samples, 3)).metrics
    assert metrics
    assert all("lane" in name for name in metrics)
    bare = [sample._replace(lane=None, boxes_xyxy=None, labels=None) for sample in samples]
    found = run(KnownNetwork(outputs(samples, noise=0.2)), batches(bare, 3))
    assert found.metrics
    assert all("drivable" in name for name in found.metrics)
    assert (found.boxes, found.lane) == (None, None)
    empty = [s._replace(boxes_xyxy=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64))
             for s in bare]  # fmt: skip
    assert "mAP50" not in run(KnownNetwork(outputs(samples, noise=0)), batches(empty, 3)).metrics


def test_an_image_without_a_label_adds_nothing() -> None:
    samples = truths()
    network = KnownNetwork(outputs(samples, noise=0.4))
    all_images = run(network, batches(samples, 3))
    labelled = [image for image in all_images.images if image.boxes is not None]
    assert [image.number for image in labelled] == [0, 1, 2, 3, 4, 6]
    boxes = {name: summarize(labelled, 2).metrics[name] for name in ("mAP50", "precision")}
    assert boxes == {name: all_images.metrics[name] for name in boxes}


def test_a_part_of_the_images_has_its_own_figures() -> None:
    samples = truths()
    found = run(KnownNetwork(outputs(samples, noise=0.4)), batches(samples, 3))
    alone = run(KnownNetwork(outputs(samples, noise=0.4)), batches(samples, 3, [1, 3]))
    part = summarize([found.images[1], found.images[3]], 2)
    assert part.metrics == alone.metrics
    assert part.metrics != found.metrics


@pytest.mark.parametrize("is_training", [True, False])
def test_a_network_with_random_weights(is_training: bool) -> None:
    torch.manual_seed(0)
    network = yolop_mtl.build_model("nano", num_classes=2).train(is_training)
    samples = truths(count=3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = run(network, batches(samples, 2), max_det=20)
    assert found.metrics.keys() >= PROMISED
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert all(0 <= value <= 1 for value in found.metrics.values())
    assert max(len(image.boxes.scores) for image in found.images) <= 20
    # Nothing learnt, no running mean moved, the mode as before.
    assert network.training is is_training
    assert all((network.state_dict()[name] == value).all() for name, value in before.items())


def test_three_kinds_of_area() -> None:
    data = DataConfig(img_size=SIZE, area_classes="three")
    torch.manual_seed(0)
    network = yolop_mtl.build_model("nano", num_classes=2, num_drivable=3, tasks=["drivable"])
    samples = truths(count=3)
    metrics = run(network, batches(samples, 2), data=data).metrics
    assert {"drivable_mIoU", "drivable_alternative_IoU", "legacy_drivable_mIoU"} <= metrics.keys()


def test_wrong_input() -> None:
    samples = truths(count=2)
    network = KnownNetwork(outputs(samples, noise=0))
    with pytest.raises(ValueError, match="data: got no image to evaluate, expected one or more"):
        run(network, [])
    bare = [batch._replace(truths=None) for batch in batches(samples, 2)]
    with pytest.raises(ValueError, match="batches: got one without truth in native pixels"):
        run(network, bare)
    with pytest.raises(ValueError, match="model: got 2 classes of boxes, expected 1; evaluate it"):
        run(network, batches(samples, 2), class_names=("vehicle",))
    three = DataConfig(img_size=SIZE, area_classes="three")
    with pytest.raises(ValueError, match="model: got 2 classes of area, expected 3; set data"):
        run(network, batches(samples, 2), data=three)
    assert network.training
