"""How prompts are initialised, dropped out and projected."""

import math

import pytest
import torch
from torch import Tensor

from e2vpt.prompts import KeyValuePrompts, VisualPrompts
from shared_utils.errors import InputError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
    prompts = VisualPrompts(12, 50, embed_dim, patch_size=patch_size)
    assert prompts.weight.shape == (12, 50, embed_dim)
    assert math.sqrt(6 / (3 * patch_size**2 + embed_dim)) == pytest.approx(bound, abs=5e-6)
    assert_uniform(prompts.weight, math.sqrt(6 / (3 * patch_size**2 + embed_dim)))


def test_every_layer_and_prompt_starts_on_its_own() -> None:
    rows = VisualPrompts(3, 4, 16, patch_size=4).weight.detach().reshape(12, 16)
    assert len(torch.unique(rows, dim=0)) == 12


def test_visual_prompts_in_eval_are_the_layers_rows() -> None:
    prompts = VisualPrompts(3, 4, 16, patch_size=4, dropout=0.5).eval()
    for layer in range(3):
        assert torch.equal(prompts(layer, 7), prompts.weight[layer][None])


def test_without_dropout_training_changes_nothing() -> None:
    prompts = VisualPrompts(2, 4, 16, patch_size=4, dropout=0.0).train()
    assert torch.equal(prompts(1, 7), prompts.weight[1][None])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_is_anew_for_each_sample_and_keeps_the_expectation(share: float) -> None:
    prompts = VisualPrompts(2, 4, 16, patch_size=4, dropout=share).train()
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
    prompts = VisualPrompts(1, 2, 8, patch_size=4, dropout=0.5).train()
    rows = prompts(0, 3)
    rows.sum().backward()
    torch.testing.assert_close(prompts.weight.grad[0], (rows.detach() != 0).sum(0) / 0.5)


def test_projection_is_one_linear_map_for_all_layers() -> None:
    prompts = VisualPrompts(3, 5, 64, patch_size=4, prompt_dim=256).eval()
    assert prompts.weight.shape == (3, 5, 256)
    assert [n for n, _ in prompts.named_parameters()] == [
        "weight",
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
    assert prompts.weight.abs().max() <= math.sqrt(6 / (3 * 16 + 256))
    assert prompts.weight.abs().max() > 0.99 * math.sqrt(6 / (3 * 16 + 256))


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
    prompts = KeyValuePrompts(120, count, 12, head_dim, share=False)
    assert math.sqrt(6 / (count * head_dim)) == pytest.approx(bound, abs=5e-6)
    for rows in (prompts.key, prompts.value):
        assert rows.shape == (120, 12, count, head_dim)
        assert_uniform(rows, math.sqrt(6 / (count * head_dim)))


@pytest.mark.parametrize("count", [1, 10])
def test_patch_bound_does_not_depend_on_the_rows(count: int) -> None:
    prompts = KeyValuePrompts(120, count, 12, 64, init="patch", patch_size=16)
    assert math.sqrt(6 / (3 * 16**2 + 16)) == pytest.approx(0.08748, abs=5e-6)
    assert_uniform(prompts.key, math.sqrt(6 / (3 * 16**2 + 16)))


def test_patch_bound_goes_by_the_patch_size() -> None:
    assert_uniform(
        KeyValuePrompts(100, 2, 6, 64, init="patch", patch_size=4).key, math.sqrt(6 / (3 * 16 + 16))
    )


@pytest.mark.parametrize("count", [1, 10])
def test_trunc_normal_has_std_002(count: int) -> None:
    rows = KeyValuePrompts(120, count, 12, 64, init="trunc-normal").key.detach()
    assert rows.std().item() == pytest.approx(0.02, rel=0.02)
    assert (rows.abs() < 0.02).float().mean().item() == pytest.approx(0.6827, abs=0.01)  # normal


def test_unknown_init_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"^kv_init: got 'he', expected kaiming, trunc-normal or patch; correct it$",
    ):
        KeyValuePrompts(1, 1, 1, 4, init="he")  # type: ignore[arg-type]


def test_shared_rows_are_one_tensor_for_keys_and_values() -> None:
    prompts = KeyValuePrompts(3, 2, 4, 8)
    assert [n for n, _ in prompts.named_parameters()] == ["key"]
    assert prompts.num_layers == 3
    for layer in range(3):
        key, value = prompts(layer)
        assert torch.equal(key, prompts.key[layer])
        assert torch.equal(value, key)
    (key * value).sum().backward()
    torch.testing.assert_close(prompts.key.grad[2], 2 * prompts.key.detach()[2])  # both uses count


def test_unshared_rows_are_two_tensors() -> None:
    prompts = KeyValuePrompts(3, 2, 4, 8, share=False)
    assert [n for n, _ in prompts.named_parameters()] == ["key", "value"]
    assert not torch.equal(prompts.key, prompts.value)
    for layer in range(3):
        key, value = prompts(layer)
        assert torch.equal(key, prompts.key[layer])
        assert torch.equal(value, prompts.value[layer])


def test_every_layer_head_and_row_starts_on_its_own() -> None:
    rows = KeyValuePrompts(3, 2, 4, 8).key.detach().reshape(24, 8)
    assert len(torch.unique(rows, dim=0)) == 24


def test_key_value_prompts_have_no_dropout() -> None:
    prompts = KeyValuePrompts(1, 2, 2, 8).train()
    assert torch.equal(prompts(0)[0], prompts.key[0])
