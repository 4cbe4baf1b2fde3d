"""The box head: what is replaced, what it shows to the sub-centroids, what it refuses."""

import copy
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor

import dnc.mmdet  # noqa: F401
from dnc.classifier import NearestCentroidHead
from dnc.mmseg.owners import centroid_heads
from dnc.mmseg.segmentors import count_parameters
from shared_utils.errors import InputError

CLASSES, WIDTH = 3, 16
WHOLE = dict(
    type="DNCShared2FCBBoxHead", in_channels=4, fc_out_channels=WIDTH, roi_feat_size=3,
    num_classes=CLASSES, num_centroids=2, loss_cls=dict(type="CrossEntropyLoss"),
    loss_bbox=dict(type="L1Loss"),
)  # fmt: skip


def build(**options: Any) -> Any:
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    head = MODELS.build({**WHOLE, **options})
    head.init_weights()
    return head.train()


def regions(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % (CLASSES + 1)  # the last is background
    return torch.randn(count, 4, 3, 3, generator=generator), labels


def step(
    head: Any, maps: Tensor, labels: Tensor, weights: Tensor | None = None
) -> dict[str, Tensor]:
    count = len(labels)
    scores, boxes = head(maps)
    rois = torch.tensor([[0.0, 0, 0, 8, 8]]).repeat(count, 1)
    weights = torch.ones(count) if weights is None else weights
    targets = torch.zeros(count, 4)
    losses: dict[str, Tensor] = head.loss(
        scores, boxes, rois, labels, weights, targets, torch.ones(count, 4)
    )
    return losses


@pytest.mark.parametrize(
    ("kind", "expected"), [(WHOLE["type"], 0), ("Shared2FCBBoxHead", (WIDTH + 1) * (CLASSES + 1))]
)
def test_parameters_of_a_classifier_are_counted(kind: str, expected: int) -> None:
    register_all_modules(init_default_scope=True)
    options = {**WHOLE, "type": kind}
    if kind != WHOLE["type"]:
        options.pop("num_centroids")
    model = torch.nn.ModuleDict({"bbox_head": MODELS.build(options)})
    assert count_parameters(model)["classifier"] == expected


def test_the_layer_norm_is_before_all_that_is_done_with_features() -> None:
    head = build(embed_norm=True)
    torch.nn.init.normal_(head.embed_norm.weight)
    seen: list[Tensor] = []
    head.shared_fcs[-1].register_forward_hook(lambda module, given, out: seen.append(out.relu()))
    maps, labels = regions()
    scores, _ = head(maps)
    normed = head.embed_norm(seen[0])
    torch.testing.assert_close(head._features, normed.detach())
    torch.testing.assert_close(scores, head.fc_cls.eval()(seen[0]))  # the hook norms this, too
    head.fc_cls.train()
    head.zero_grad()
    sum(value for name, value in step(head, maps, labels).items() if "loss" in name).backward()
    assert head.embed_norm.weight.grad.abs().sum() > 0
    twin = copy.deepcopy(head)  # as an average of weights is made
    torch.nn.init.constant_(twin.embed_norm.weight, 2.0)
    assert not torch.equal(twin(maps)[0], head(maps)[0])


def test_the_classifier_has_no_parameters_and_the_background_a_place() -> None:
    head = build()
    assert isinstance(head.fc_cls, NearestCentroidHead)
    assert sum(p.numel() for p in head.fc_cls.parameters()) == 0
    assert head.fc_cls.centroids.shape == (CLASSES + 1, 2, WIDTH)
    names = [name for name, _ in head.named_parameters()]
    assert not [name for name in names if name.startswith("fc_cls")]
    assert head.fc_reg.weight.std() < 0.002  # mmdet's own start of the other layers stays
    assert [name for name, _ in centroid_heads(head)] == [""]


def test_logits_are_the_best_cosines_over_the_temperature() -> None:
    head = build().eval()
    maps, _ = regions()
    with torch.no_grad():
        scores, boxes = head(maps)
        x = maps.flatten(1)
        for layer in head.shared_fcs:
            x = layer(x).relu()
        z = torch.nn.functional.normalize(x, dim=1)
        best = torch.einsum("nd,ckd->nck", z, head.fc_cls.centroids).amax(2)
    assert torch.allclose(scores, best / 0.1, atol=1e-5)
    assert boxes.shape == (12, 4 * CLASSES)


def test_a_step_trains_the_features_and_moves_the_sub_centroids() -> None:
    head = build()
    maps, labels = regions()
    losses = step(head, maps, labels)
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    assert float(head.shared_fcs[0].weight.grad.abs().sum()) > 0
    assert bool(head.fc_cls.seeded.all())
    before = head.fc_cls.centroids.clone()
    head.fc_cls.update()
    assert int(head.fc_cls.updates.sum()) == 2 * (CLASSES + 1)
    assert not torch.equal(before, head.fc_cls.centroids)


def test_without_a_hook_the_next_loss_moves_them_first() -> None:
    head = build()
    maps, labels = regions()
    step(head, maps, labels)
    assert int(head.fc_cls.updates.sum()) == 0
    step(head, maps, labels)
    assert int(head.fc_cls.updates.sum()) > 0
    hooked = build()
    hooked.is_hooked = True
    step(hooked, maps, labels)
    step(hooked, maps, labels)
    assert int(hooked.fc_cls.updates.sum()) == 0


def test_regions_of_weight_0_do_not_count() -> None:
    head = build()
    maps, labels = regions()
    weights = (labels != 1).float()
    step(head, maps, labels, weights)
    assert head.fc_cls.seeded.all(dim=1).tolist() == [True, False, True, True]


def test_evaluation_changes_nothing() -> None:
    head = build()
    maps, labels = regions()
    step(head, maps, labels)
    head.eval()
    before = {name: buffer.clone() for name, buffer in head.fc_cls.named_buffers()}
    with torch.no_grad():
        head(maps)
    for name, buffer in head.fc_cls.named_buffers():
        assert torch.equal(before[name], buffer), name


def test_no_region_at_all_is_legal() -> None:
    head = build()
    losses = step(head, torch.zeros(0, 4, 3, 3), torch.zeros(0, dtype=torch.int64))
    assert all(torch.isfinite(value).all() for value in losses.values())
    head.fc_cls.update()
    assert not bool(head.fc_cls.seeded.any())


def test_a_loss_on_sigmoids_is_refused() -> None:
    told = r"bbox_head\.loss_cls: got CrossEntropyLoss on sigmoids"
    with pytest.raises(InputError, match=told):
        build(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True))


def test_options_of_the_classifier_arrive() -> None:
    head = build(centroids=dict(temperature=0.2, momentum=0.5, memory_size=8))
    assert (head.fc_cls.temperature, head.fc_cls.momentum, head.fc_cls.memory.size) == (0.2, 0.5, 8)
