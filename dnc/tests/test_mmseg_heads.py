"""The decoders: each builds, learns and predicts, and the pitfalls of mmseg's loss path."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from torch import nn

from dnc.mmseg.heads import labels_at
from dnc.mmseg.owners import centroid_heads
from shared_utils.errors import InputError

from .seg_data import (
    CLASSES,
    HEADS,
    SIDE,
    batch,
    build,
    classifier,
    conv_keys,
    head_config,
    model_config,
    samples,
    step,
)


@pytest.mark.parametrize("kind", HEADS)
def test_each_head_trains_a_step_and_predicts(kind: str) -> None:
    model = build(model_config(kind))
    assert not conv_keys(model)
    assert not list(classifier(model).parameters())
    images, labels = batch()
    losses = step(model, images, labels)
    assert torch.isfinite(losses["decode.loss_ce"])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert bool(classifier(model).seeded.all())
    # The centroids move after the step, not before.
    before = classifier(model).centroids.clone()
    step(model, *batch(1))
    moved = classifier(model).centroids
    assert int(classifier(model).updates.sum()) > 0  # of the first step, as the second began
    assert not torch.equal(before, moved)
    model.eval()
    with torch.no_grad():
        found = model.predict(images, samples(labels))
    assert found[0].seg_logits.data.shape == (CLASSES, SIDE, SIDE)
    assert found[0].pred_sem_seg.data.shape == (1, SIDE, SIDE)


def test_centroids_stay_until_the_next_loss_or_the_hooks_update() -> None:
    model = build(model_config())
    step(model, *batch())
    seeded = classifier(model).centroids.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert torch.equal(seeded, classifier(model).centroids)
    model.decode_head.is_hooked = True
    step(model, *batch(1))
    assert torch.equal(seeded, classifier(model).centroids)  # left to the hook
    classifier(model).update()
    assert not torch.equal(seeded, classifier(model).centroids)


def test_one_batch_is_learnt() -> None:
    model = build(model_config(dropout_ratio=0))
    images, labels = batch()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        losses.append(float(step(model, images, labels)["decode.loss_ce"]))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_features_are_observed_before_dropout_at_their_own_resolution() -> None:
    model = build(model_config())
    seen: list[torch.Tensor] = []
    head = model.decode_head
    head.dropout = nn.Threshold(torch.inf, 0.0)  # drops everything
    observe = classifier(model).observe

    def watched(features: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(features)
        observe(features, labels)

    classifier(model).observe = watched
    images, labels = batch()
    losses = model.loss(images, samples(labels))
    (features,) = seen
    assert features.shape[2:] == (SIDE // 8, SIDE // 8)
    assert not features.requires_grad
    assert float(features.abs().sum()) > 0
    # All logits are alike where all features were dropped.
    assert float(losses["decode.loss_ce"]) > 0


def test_ignored_pixels_never_reach_the_update() -> None:
    model = build(model_config())
    images, labels = batch()
    model.loss(images, samples(labels))
    grid = labels_at(labels, SIDE // 8, SIDE // 8)
    waiting = classifier(model)._pending[0]
    assert len(waiting.labels) == int((grid != 255).sum()) < grid.numel()
    assert int(waiting.labels.max()) < CLASSES


def test_a_crop_with_nothing_but_ignored_pixels_changes_nothing() -> None:
    model = build(model_config())
    images, labels = batch()
    step(model, images, labels)
    classifier(model).update()
    before = copy.deepcopy(classifier(model).state_dict())
    losses = step(model, images, torch.full_like(labels, 255))
    classifier(model).update()
    assert float(losses["decode.loss_ce"]) == 0
    after = classifier(model).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_crop_with_nothing_to_seed_from_comes_first() -> None:
    model = build(model_config())
    images, labels = batch()
    step(model, images, torch.full_like(labels, 255))
    assert not bool(classifier(model).seeded.any())
    step(model, images, labels)
    assert bool(classifier(model).seeded.all())


def test_labels_of_the_centres_of_cells() -> None:
    labels = torch.arange(16).view(1, 4, 4)
    assert labels_at(labels, 2, 2).tolist() == [[[5, 7], [13, 15]]]
    assert labels_at(labels, 4, 4).tolist() == labels.tolist()
    assert labels_at(labels, 1, 3).tolist() == [[[8, 10, 11]]]
    assert labels_at(labels, 2, 2, align_corners=True).tolist() == [[[0, 3], [12, 15]]]
    assert labels_at(labels, 1, 4, align_corners=True).tolist() == [[[8, 9, 10, 11]]]
    assert labels_at(labels, 8, 8)[0, :2, :4].tolist() == [[0, 0, 1, 1]] * 2


def test_a_label_that_is_no_class_names_its_image() -> None:
    model = build(model_config())
    images, labels = batch()
    labels[1, 20, 20] = 7
    told = re.escape(
        "label of labels/1.png: got 7, expected 0 to 2, or 255 to leave a pixel out; "
        "check num_classes, and reduce_zero_label of the data set"
    )
    with pytest.raises(InputError, match=told):
        model.loss(images, samples(labels))
    assert not bool(classifier(model).seeded.any())
    assert model.decode_head._labels is None


@pytest.mark.parametrize("wrong", [1, 4])
def test_each_class_needs_its_own_logit(wrong: int) -> None:
    told = rf"out_channels: got {wrong}, expected 3, as num_classes: .*; leave it out"
    with pytest.raises(InputError, match=told):
        build(model_config(out_channels=wrong))


def test_two_classes_are_no_occasion_for_advice() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = build(model_config(num_classes=2))
    assert not [str(w.message) for w in told if "binary" in str(w.message)]
    assert model.out_channels == 2


def test_an_auxiliary_head_has_its_own_sub_centroids() -> None:
    config = model_config()
    config["auxiliary_head"] = head_config(
        in_channels=16, in_index=2, num_convs=1, concat_input=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
    )  # fmt: skip
    model = build(config)
    losses = step(model, *batch())
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys()
    assert [name for name, _ in centroid_heads(model)] == ["decode_head", "auxiliary_head"]
    assert all(bool(head.classifier.seeded.all()) for _, head in centroid_heads(model))


def test_options_reach_the_classifier() -> None:
    options = dict(momentum=0.9, temperature=0.2, memory="queue", memory_size=8)
    model = build(model_config(num_centroids=5, centroids=options))
    head = classifier(model)
    assert (head.num_centroids, head.momentum, head.temperature) == (5, 0.9, 0.2)
    assert head.memory.size == 8


def test_normalised_pixels_are_what_is_observed_and_classified() -> None:
    model = build(model_config(embed_norm=True))
    nn.init.constant_(model.decode_head.embed_norm.bias, 0.5)
    seen: list[torch.Tensor] = []
    classifier(model).observe = lambda features, labels: seen.append(features)
    images, labels = batch()
    step(model, images, labels)
    assert model.decode_head.embed_norm.weight.grad.abs().sum() > 0
    assert torch.allclose(seen[0].mean(dim=1), torch.tensor(0.5), atol=1e-4)
    features = torch.rand(1, model.decode_head.channels, 2, 3)
    model.eval()
    normed = torch.nn.functional.layer_norm(features[0, :, 1, 2], features.shape[1:2]) + 0.5
    expected = classifier(model)(normed[None])[0]
    logits = model.decode_head.cls_seg(features)
    assert torch.allclose(logits[0, :, 1, 2], expected, atol=1e-5)
    plain = build(model_config())
    assert plain.decode_head.embed_norm is None


def test_hard_pixels_are_sampled() -> None:
    sampler = dict(type="OHEMPixelSampler", thresh=0.7, min_kept=50)
    model = build(model_config(sampler=sampler, dropout_ratio=0))
    images, labels = batch()
    some = step(model, images, labels)["decode.loss_ce"]
    everything = build(model_config(dropout_ratio=0))
    assert float(some) <= float(step(everything, images, labels)["decode.loss_ce"])
    assert bool(classifier(model).seeded.all())


def test_a_window_as_large_as_the_image_gives_what_the_whole_gives() -> None:
    model = build(model_config()).eval()
    images, labels = batch()
    with torch.no_grad():
        whole = model.predict(images, samples(labels))[0].seg_logits.data
        model.test_cfg = ConfigDict(mode="slide", crop_size=(SIDE, SIDE), stride=(SIDE, SIDE))
        slid = model.predict(images, samples(labels))[0].seg_logits.data
        model.test_cfg = ConfigDict(mode="slide", crop_size=(16, 16), stride=(8, 8))
        parts = model.predict(images, samples(labels))[0].seg_logits.data
    torch.testing.assert_close(slid, whole)
    assert parts.shape == whole.shape
    assert bool(torch.isfinite(parts).all())


def test_test_time_augmentation_averages_probabilities() -> None:
    config = dict(type="SegTTAModel", module=model_config(), data_preprocessor=None)
    model = build(config).eval()
    images, labels = batch(count=1)
    uint8 = ((images + 1) * 100).clamp(0, 255).to(torch.uint8)
    flipped = samples(labels)
    flipped[0].set_metainfo(dict(flip=True, flip_direction="horizontal"))
    data = dict(inputs=[[uint8[0]], [uint8[0].flip(2)]], data_samples=[samples(labels), flipped])
    with torch.no_grad():
        (found,) = model.test_step(data)
    assert found.pred_sem_seg.data.shape == (1, SIDE, SIDE)


def test_autocast_leaves_scores_and_sub_centroids_in_float32() -> None:
    model = build(model_config(dropout_ratio=0))
    images, labels = batch()
    kinds: list[Any] = []
    classifier(model).register_forward_hook(lambda m, a, out: kinds.append((a[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(images, samples(labels))
    losses["decode.loss_ce"].backward()
    assert kinds == [(torch.bfloat16, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        classifier(model).update()
    assert classifier(model).centroids.dtype == torch.float32
    norms = classifier(model).centroids.norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)


def test_a_synchronised_norm_is_reverted_on_a_cpu() -> None:
    config = model_config()
    for part in (config["backbone"], config["decode_head"]):
        part["norm_cfg"] = dict(type="SyncBN", requires_grad=True)
    model = revert_sync_batchnorm(build(config))
    assert torch.isfinite(step(model, *batch())["decode.loss_ce"])


def test_a_softmax_checkpoint_gives_its_decoder_and_seeds_anew() -> None:
    softmax = build(model_config("FCNHead"))
    model = build(model_config())
    report = model.load_state_dict(softmax.state_dict(), strict=False)
    assert set(report.unexpected_keys) == set(conv_keys(softmax))
    assert {key.split(".")[1] for key in report.missing_keys} == {"classifier"}
    assert not bool(classifier(model).seeded.any())
    step(model, *batch())
    assert bool(classifier(model).seeded.all())


def test_a_model_in_eval_mode_or_without_gradients_keeps_nothing() -> None:
    model = build(model_config())
    images, labels = batch()
    with torch.no_grad():
        model.loss(images, samples(labels))
    model.eval().loss(images, samples(labels))
    assert not classifier(model)._pending
    assert not bool(classifier(model).seeded.any())


def test_losses_before_one_backward_may_add_up() -> None:
    model = build(model_config(dropout_ratio=0))
    total = sum(
        model.loss(images, samples(labels))["decode.loss_ce"]
        for images, labels in (batch(), batch(1))
    )
    total.backward()
    assert int(classifier(model).updates.sum()) > 0
