"""Importance of prompts, and removing them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import e2vpt
from e2vpt.model import PromptedModel, PromptSpec, parameter_report, tuned_state
from e2vpt.search_config import segment_counts, token_counts
from e2vpt.vit import run_block as plain_run_block
from shared_utils.checkpoint import rng_state
from shared_utils.errors import InputError

WIDTH, PROMPTS, CLASSES, IMAGES = 16, 6, 5, 7
Batch = tuple[Tensor, Tensor]


def build(**spec: Any) -> PromptedModel:
    """A ViT of depth 3 in float64 whose weights say something, with prompts that matter."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=2, num_classes=0
    ).double()
    options = {"num_visual_prompts": PROMPTS, "num_kv_prompts": 2, **spec}
    model = PromptedModel(vit, PromptSpec(num_classes=CLASSES, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            elif "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batches(size: int) -> list[Batch]:
    """The same seven images, so many at a time."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


class Masked(torch.nn.Module):
    """Visual prompts times explicit mask variables: what the paper writes."""

    def __init__(self, model: PromptedModel, mask: Tensor) -> None:
        super().__init__()
        self.visual, self.mask, self.num_layers = model.visual, mask, model.visual.num_layers

    def forward(self, layer: int, batch: int) -> Tensor:
        return (self.visual.rows(layer) * self.mask)[None]


def loss_of(model: PromptedModel, mask: Tensor, image: Tensor, label: Tensor) -> Tensor:
    """Loss of one image under a mask (P, 1) or (P, D) shared by all layers."""
    logits = model.head(model.features_with(image[None], Masked(model, mask), model.kv))
    return F.cross_entropy(logits, label[None])


def gradients(model: PromptedModel, width: int) -> Tensor:
    """Each image's gradient of a mask, by a loop: (images, P, width)."""
    found = []
    for images, labels in batches(1):
        mask = torch.ones(PROMPTS, width, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(loss_of(model, mask, images[0], labels[0]), mask)[0])
    return torch.stack(found)


@pytest.mark.parametrize("spec", [{}, {"deep": False}, {"token_form": True}, {"prompt_dim": 6}])
def test_scores_equal_mask_gradients_image_by_image(spec: dict[str, Any]) -> None:
    model = build(**spec)
    tokens = gradients(model, 1)[..., 0]
    segments = gradients(model, WIDTH).view(IMAGES, PROMPTS, 4, -1).sum(-1)
    scores = e2vpt.importance(model, batches(3), 4)
    assert scores["tokens"].dtype == scores["segments"].dtype == torch.float64
    torch.testing.assert_close(scores["tokens"], tokens.abs().mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(scores["segments"], segments.abs().mean(0), rtol=1e-10, atol=1e-14)
    assert scores["tokens"].min() > 1e-6
    # One mask of a token is all its segments' masks at once.
    torch.testing.assert_close(segments.sum(-1), tokens, rtol=1e-10, atol=1e-14)
    # The absolute value is inside the mean.
    assert (scores["tokens"] >= tokens.mean(0).abs()).all()
    assert (scores["tokens"] > tokens.mean(0).abs() + 1e-9).any()
    signed = e2vpt.importance(model, batches(3), 4, compat=True)
    torch.testing.assert_close(signed["tokens"], tokens.mean(0), rtol=1e-10, atol=1e-14)


def test_interleaved_segments_take_every_rth_dimension() -> None:
    model = build()
    by_dimension = gradients(model, WIDTH)
    expected = (
        torch.stack([by_dimension[..., r::4].sum(-1) for r in range(4)], dim=-1).abs().mean(0)
    )
    got = e2vpt.importance(model, batches(7), 4, interleaved=True)["segments"]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(got, e2vpt.importance(model, batches(7), 4)["segments"])


def test_a_mask_gradient_is_a_central_difference() -> None:
    model, h = build(), 1e-5
    images, labels = batches(1)[0]
    exact = gradients(model, 1)[0, :, 0]
    for k in range(PROMPTS):
        step = torch.zeros(PROMPTS, 1, dtype=torch.float64)
        step[k] = h
        up, down = (loss_of(model, 1 + s * step, images[0], labels[0]).item() for s in (1, -1))
        assert (up - down) / (2 * h) == pytest.approx(exact[k].item(), abs=1e-9)


@pytest.mark.parametrize("per_layer", [False, True])
def test_scores_do_not_depend_on_batches_or_order(per_layer: bool) -> None:
    model = build()
    first = e2vpt.importance(model, batches(7), 4, per_layer=per_layer)
    other = e2vpt.importance(model, batches(2)[::-1], 4, per_layer=per_layer)
    for name in ("tokens", "segments"):
        torch.testing.assert_close(first[name], other[name], rtol=1e-11, atol=1e-15)
    assert first["tokens"].shape == ((3, PROMPTS) if per_layer else (PROMPTS,))


def test_scoring_leaves_everything_as_it_was() -> None:
    model = build(prompt_dropout=0.5).train()
    model.visual.dropout = 0.5
    before = {n: p.clone() for n, p in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    model.head.weight.grad = torch.ones_like(model.head.weight)

    def loader() -> Iterator[Batch]:
        torch.rand(5)  # as a loader's own sampler draws
        yield from batches(3)

    random = rng_state()
    scores = e2vpt.importance(model, loader(), 4)
    again = rng_state()
    assert torch.equal(random["torch"], again["torch"])
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")
    assert (model.head.weight.grad == 1).all()
    quiet = e2vpt.importance(model.eval(), batches(3), 4)  # dropout is off while scoring
    assert torch.equal(scores["tokens"], quiet["tokens"])


def test_pruned_tokens_are_gone() -> None:
    model = build()
    scores = e2vpt.importance(model, batches(7), 4)
    small = e2vpt.prune(model, scores, num_tokens=2)
    stays = scores["tokens"].argsort()[2:].sort().values
    for old, new in zip(model.visual.weight, small.visual.weight, strict=True):
        assert torch.equal(new, old[stays])
    by_hand = build(num_visual_prompts=PROMPTS - 2)
    by_hand.load_state_dict(small.state_dict())
    images = batches(7)[0][0]
    assert torch.equal(by_hand(images), small(images))
    assert (small(images) - model(images)).abs().max() > 1e-3
    report, before = parameter_report(small), parameter_report(model)
    assert before["visual"] - report["visual"] == 2 * 3 * WIDTH
    assert model.visual.weight[0].shape == (PROMPTS, WIDTH)  # the argument is as it was


def test_blocks_see_the_shorter_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(token_form=True)
    small = e2vpt.prune(model, e2vpt.importance(model, batches(7), 4), num_tokens=2)
    seen: list[int] = []

    def watched(block: Any, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[1])
        return plain_run_block(block, x, *rest)

    monkeypatch.setattr("e2vpt.vit.run_block", watched)
    small(batches(7)[0][0])
    assert seen == [5 + PROMPTS - 2] * 3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_pruned_segments_are_not_stored_and_act_as_zeros(
    interleaved: bool, per_layer: bool
) -> None:
    model = build()
    options: dict[str, Any] = {"interleaved": interleaved, "per_layer": per_layer}
    scores = e2vpt.importance(model, batches(7), 4, **options)
    small = e2vpt.prune(model, scores, num_segments=3)
    assert [w.shape for w in small.visual.weight] == [(PROMPTS, 1, WIDTH // 4)] * 3
    report = parameter_report(small)
    assert report["visual"] == parameter_report(model)["visual"] // 4
    for layer in range(3):
        kept = (scores["segments"][layer] if per_layer else scores["segments"]).argmax(-1)
        dimension = torch.arange(WIDTH)
        segment = dimension % 4 if interleaved else dimension // 4
        expected = model.visual.weight[layer] * (segment[None] == kept[:, None])
        assert torch.equal(small.visual.rows(layer), expected)
    # They train, and are saved with what they are segments of.
    F.cross_entropy(small(batches(7)[0][0]), batches(7)[0][1]).backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in small.visual.weight)
    assert "visual.segments" in tuned_state(small)


def test_pruned_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = build()
    scores = e2vpt.importance(model, batches(7), 4)
    small = e2vpt.prune(model, scores, num_tokens=2, num_segments=2)
    e2vpt.save(small, tmp_path)
    images = batches(7)[0][0]
    expected = small(images)
    loaded = e2vpt.load(tmp_path, build().backbone)
    assert torch.equal(loaded(images), expected)
    assert parameter_report(loaded) == parameter_report(small)


def test_cascade_by_two_calls() -> None:
    model = build()
    fewer = e2vpt.prune(model, e2vpt.importance(model, batches(7), 4), num_tokens=3)
    second = e2vpt.importance(fewer, batches(7), 4)
    both = e2vpt.prune(fewer, second, num_segments=2)
    assert both.spec.num_visual_prompts == 3
    kept = second["segments"].argsort(dim=-1)[:, 2:].sort(dim=-1).values
    assert torch.equal(both.visual.segments[0].long(), kept)
    third = e2vpt.prune(both, e2vpt.importance(both, batches(7), 4), num_tokens=1)
    assert third.visual.segments.shape == (1, 2, 2)


def test_a_prompt_of_zeros_scores_zero_and_goes_first_unless_signed() -> None:
    """The released code ranks by signed gradients: whatever is negative goes before it."""
    model = build()
    with torch.no_grad():
        for weight in model.visual.weight:
            weight[2] = 0
    scores = e2vpt.importance(model, batches(7), 4)
    assert scores["tokens"][2] == 0
    assert scores["tokens"].argmin() == 2
    small = e2vpt.prune(model, scores, num_tokens=1)
    left = [0, 1, 3, 4, 5]
    assert torch.equal(small.visual.weight[0], model.visual.weight[0][left])
    signed = e2vpt.importance(model, batches(7), 4, compat=True)
    assert signed["tokens"][2] == 0
    assert signed["tokens"].min() < 0
    assert signed["tokens"].argmin() != 2


def test_zeroing_is_not_removing() -> None:
    model = build()
    scores = e2vpt.importance(model, batches(7), 4)
    images = batches(7)[0][0]
    removed = e2vpt.prune(model, scores, num_tokens=2)
    zeroed = e2vpt.prune(model, scores, num_tokens=2, compat=True)
    assert zeroed.spec.num_visual_prompts == PROMPTS
    assert (removed(images) - zeroed(images)).abs().max() > 1e-4
    gone = scores["tokens"].argsort()[:2]
    assert zeroed.visual.rows(0)[gone].abs().max() == 0
    # A zeroed token is one whose LayerNorm output is the norm's bias.
    vit = zeroed.backbone
    normed = vit.blocks[0].norm1(zeroed.visual.rows(0)[gone][None])
    torch.testing.assert_close(normed[0, 0], vit.blocks[0].norm1.bias)
    # It stays zero in training.
    optimizer = torch.optim.SGD(zeroed.parameters(), lr=1.0)
    F.cross_entropy(zeroed(images), batches(7)[0][1]).backward()
    optimizer.step()
    assert zeroed.visual.rows(0)[gone].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tokens": 6}, r"^num_tokens: got 6, expected 0 to 5, so that one is left; lower it$"),
        ({"num_tokens": -1}, r"^num_tokens: got -1"),
        ({"num_segments": 4}, r"^num_segments: got 4, expected 0 to 3"),
    ],
)
def test_something_must_be_left(options: dict[str, int], match: str) -> None:
    model = build()
    scores = e2vpt.importance(model, batches(7), 4)
    with pytest.raises(InputError, match=match):
        e2vpt.prune(model, scores, **options)


def test_wrong_input_is_named() -> None:
    model = build()
    with pytest.raises(
        InputError, match=r"^num_segments: got 5, expected a divisor of the width 16"
    ):
        e2vpt.importance(model, batches(7), 5)
    with pytest.raises(InputError, match=r"^loader: got no images"):
        e2vpt.importance(model, [], 4)
    bare = build(num_visual_prompts=0)
    with pytest.raises(InputError, match=r"^model: got no visual prompts, expected some to score"):
        e2vpt.importance(bare, batches(7), 4)
    scores = e2vpt.importance(model, batches(7), 4)
    with pytest.raises(InputError, match=r"^model: got no visual prompts, expected some to prune"):
        e2vpt.prune(bare, scores, 1)
    small = e2vpt.prune(model, scores, 1, 1)
    with pytest.raises(InputError, match=r"^scores: got shape \(6, 4\), expected 3 layers, 5 "):
        e2vpt.prune(small, scores, 1)
    scores = e2vpt.importance(small, batches(7), 4)
    with pytest.raises(InputError, match=r"^model: got prompts whose segments are cut"):
        e2vpt.prune(small, scores, 0, 1)
    projected = build(prompt_dim=6)
    with pytest.raises(InputError, match=r"^model: got prompts with a projection"):
        e2vpt.prune(projected, e2vpt.importance(projected, batches(7), 4), 0, 1)


@pytest.mark.parametrize(
    ("prompts", "counts"),
    [
        (1, [0]), (5, [0, 1, 2, 3, 4]), (10, list(range(1, 10))), (20, list(range(2, 20, 2))),
        (32, [3, 6, 9, 12, 16, 19, 22, 25, 28]), (100, list(range(10, 100, 10))),
    ],
)  # fmt: skip
def test_token_counts_are_the_papers(prompts: int, counts: list[int]) -> None:
    assert token_counts(prompts) == counts


def test_segment_counts_are_the_papers() -> None:
    assert segment_counts(16) == [1, 3, 4, 6, 8, 9, 11, 12]
    assert segment_counts(8) == [0, 1, 2, 3, 4]
    assert segment_counts(8, min_kept=1) == list(range(8))


def test_count_of_a_pruned_vit_b() -> None:
    """P10 with 3 tokens and 6 of 16 segments removed, n5: 86,400 prompt parameters."""
    with torch.device("meta"):
        vit = VisionTransformer(embed_dim=768, depth=12, num_heads=12, num_classes=0)
        spec = PromptSpec(
            num_classes=100, num_visual_prompts=7, num_segments=16, num_kept_segments=10
        )
        report = parameter_report(PromptedModel(vit, spec))
    assert report["visual"] == 40_320
    assert report["visual"] + report["kv"] == 86_400
    assert report["tuned"] == 163_300
