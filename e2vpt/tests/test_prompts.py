"""How prompts are initialised, dropped out and projected."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2vpt.geometry import Geometry, LayerGeometry
from e2vpt.prompts import KeyValuePrompts, VisualPrompts
from shared_utils.errors import InputError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def key_value(
    num_layers: int, count: int, heads: int, head_dim: int, patch_size: int = 16, **options: Any
) -> KeyValuePrompts:
    """Rows for layers of one geometry."""
    layer = LayerGeometry(heads * head_dim, heads, head_dim)
    geometry = Geometry((layer,) * num_layers, patch_size, 1)
    return KeyValuePrompts(geometry, [count] * num_layers, **options)


def stacked(tensors: nn.ParameterList | None) -> Tensor:
    """(L, ...)."""
    assert tensors is not None
    return torch.stack([tensor.detach() for tensor in tensors])


def assert_uniform(values: Tensor, bound: float) -> None:
    """Fills [-bound, bound] evenly: extremes, mean, spread and quartiles."""
    flat = values.detach().flatten().double()
    assert flat.numel() >= 40_000
    assert flat.abs().max() <= bound * (1 + 1e-6)
    assert flat.max() > 0.995 * bound
    assert flat.min() < -0.995 * bound
    assert flat.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(flat.mean().item()) < 0.03 * bound
    assert flat.abs().median().item() == pytest.approx(bound / 2, rel=0.03)


# --- visual prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embed_dim", "patch_size", "bound"),
    [(768, 16, 0.0625), (1024, 16, 0.05786), (384, 16, 0.07217), (128, 4, 0.18464)],
)  # fmt: skip
def test_visual_prompts_start_within_the_papers_bound(
    embed_dim: int, patch_size: int, bound: float
) -> None:
    prompts = VisualPrompts([embed_dim] * 12, 50, patch_size=patch_size)
    assert stacked(prompts.weight).shape == (12, 50, embed_dim)
    assert math.sqrt(6 / (3 * patch_size**2 + embed_dim)) == pytest.approx(bound, abs=5e-6)
    assert_uniform(stacked(prompts.weight), math.sqrt(6 / (3 * patch_size**2 + embed_dim)))


def test_every_layer_and_prompt_starts_on_its_own() -> None:
    rows = stacked(VisualPrompts([16] * 3, 4, patch_size=4).weight).reshape(12, 16)
    assert len(torch.unique(rows, dim=0)) == 12


def test_visual_prompts_in_eval_are_the_layers_rows() -> None:
    prompts = VisualPrompts([16] * 3, 4, patch_size=4, dropout=0.5).eval()
    for layer in range(3):
        assert torch.equal(prompts(layer, 7), prompts.weight[layer][None])


def test_without_dropout_training_changes_nothing() -> None:
    prompts = VisualPrompts([16] * 2, 4, patch_size=4, dropout=0.0).train()
    assert torch.equal(prompts(1, 7), prompts.weight[1][None])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_is_anew_for_each_sample_and_keeps_the_expectation(share: float) -> None:
    prompts = VisualPrompts([16] * 2, 4, patch_size=4, dropout=share).train()
    batch = 20_000
    rows = prompts(1, batch).detach()
    assert rows.shape == (batch, 4, 16)
    weight = prompts.weight[1].detach()
    dropped = rows == 0
    torch.testing.assert_close(rows[~dropped], (weight / (1 - share)).expand_as(rows)[~dropped])
    assert dropped.float().mean().item() == pytest.approx(share, rel=0.02)
    # Independent: two samples agree on a value as often as chance has it, not always.
    together = (dropped[0::2] & dropped[1::2]).float().mean().item()
    assert together == pytest.approx(share**2, rel=0.05)
    # Mean over samples: the weight, within five standard errors of the weakest bound.
    error = weight.abs().max() * math.sqrt(share / (1 - share) / batch)
    assert (rows.mean(0) - weight).abs().max() < 5 * error
    assert not torch.equal(prompts(1, 4), prompts(1, 4))


def test_gradients_pass_dropout_to_the_kept_values_only() -> None:
    prompts = VisualPrompts([8], 2, patch_size=4, dropout=0.5).train()
    rows = prompts(0, 3)
    rows.sum().backward()
    torch.testing.assert_close(prompts.weight[0].grad, (rows.detach() != 0).sum(0) / 0.5)


def test_projection_is_one_linear_map_for_all_layers() -> None:
    prompts = VisualPrompts([64] * 3, 5, patch_size=4, prompt_dim=256).eval()
    assert stacked(prompts.weight).shape == (3, 5, 256)
    assert [n for n, _ in prompts.named_parameters()] == [
        "weight.0",
        "weight.1",
        "weight.2",
        "project.weight",
        "project.bias",
    ]
    assert prompts.project.weight.shape == (64, 256)
    for layer in range(3):
        expected = prompts.weight[layer] @ prompts.project.weight.T + prompts.project.bias
        torch.testing.assert_close(prompts(layer, 2), expected[None])
    # Kaiming normal, fan out: std sqrt(2 / 64), not sqrt(2 / 256).
    assert prompts.project.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)
    assert prompts.project.weight.abs().max() > 2.5 * math.sqrt(2 / 64)  # normal, not uniform
    assert prompts.project.bias.abs().max() == 0
    # The range goes by the prompts' own width.
    assert stacked(prompts.weight).abs().max() <= math.sqrt(6 / (3 * 16 + 256))
    assert stacked(prompts.weight).abs().max() > 0.99 * math.sqrt(6 / (3 * 16 + 256))


# --- key-value prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "head_dim", "bound"),
    [
        (1, 64, 0.30619), (5, 64, 0.13693), (10, 64, 0.09682), (20, 64, 0.06847),  # ViT-B
        (1, 32, 0.43301), (5, 32, 0.19365), (10, 32, 0.13693),  # Swin-B
    ],
)  # fmt: skip
def test_kaiming_bound_shrinks_with_the_number_of_rows(
    count: int, head_dim: int, bound: float
) -> None:
    prompts = key_value(120, count, 12, head_dim, share=False)
    assert math.sqrt(6 / (count * head_dim)) == pytest.approx(bound, abs=5e-6)
    for rows in (stacked(prompts.key), stacked(prompts.value)):
        assert rows.shape == (120, 12, count, head_dim)
        assert_uniform(rows, math.sqrt(6 / (count * head_dim)))


@pytest.mark.parametrize("count", [1, 10])
def test_patch_bound_does_not_depend_on_the_rows(count: int) -> None:
    prompts = key_value(120, count, 12, 64, 16, init="patch")
    assert math.sqrt(6 / (3 * 16**2 + 16)) == pytest.approx(0.08748, abs=5e-6)
    assert_uniform(stacked(prompts.key), math.sqrt(6 / (3 * 16**2 + 16)))


def test_patch_bound_goes_by_the_patch_size() -> None:
    assert_uniform(
        stacked(key_value(100, 2, 6, 64, 4, init="patch").key), math.sqrt(6 / (3 * 16 + 16))
    )


@pytest.mark.parametrize("count", [1, 10])
def test_trunc_normal_has_std_002(count: int) -> None:
    rows = stacked(key_value(120, count, 12, 64, init="trunc-normal").key)
    assert rows.std().item() == pytest.approx(0.02, rel=0.02)
    assert (rows.abs() < 0.02).float().mean().item() == pytest.approx(0.6827, abs=0.01)  # normal


def test_unknown_init_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"^kv_init: got 'he', expected kaiming, trunc-normal or patch; correct it$",
    ):
        key_value(1, 1, 1, 4, init="he")


def test_shared_rows_are_one_tensor_for_keys_and_values() -> None:
    prompts = key_value(3, 2, 4, 8)
    assert [n for n, _ in prompts.named_parameters()] == ["key.0", "key.1", "key.2"]
    assert prompts.num_layers == 3
    for layer in range(3):
        key, value = prompts(layer)
        assert torch.equal(key, prompts.key[layer])
        assert torch.equal(value, key)
    (key * value).sum().backward()
    torch.testing.assert_close(prompts.key[2].grad, 2 * prompts.key[2].detach())  # both uses count


def test_unshared_rows_are_two_tensors() -> None:
    prompts = key_value(3, 2, 4, 8, share=False)
    assert [n for n, _ in prompts.named_parameters()] == [
        f"{kind}.{layer}" for kind in ("key", "value") for layer in range(3)
    ]
    assert not torch.equal(stacked(prompts.key), stacked(prompts.value))
    for layer in range(3):
        key, value = prompts(layer)
        assert torch.equal(key, prompts.key[layer])
        assert prompts.value is not None
        assert torch.equal(value, prompts.value[layer])


def test_every_layer_head_and_row_starts_on_its_own() -> None:
    rows = stacked(key_value(3, 2, 4, 8).key).reshape(24, 8)
    assert len(torch.unique(rows, dim=0)) == 24


def test_key_value_prompts_have_no_dropout() -> None:
    prompts = key_value(1, 2, 2, 8).train()
    assert torch.equal(prompts(0)[0], prompts.key[0])
