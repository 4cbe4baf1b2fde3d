"""What a run starts from: which prompts stay, and the values they are given."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import e2vpt
from e2vpt import start
from e2vpt.config import PruneConfig, TrainConfig
from e2vpt.data import build_loader
from e2vpt.methods import build_spec
from e2vpt.model import PromptedModel, PromptSpec
from e2vpt.train import Setup, prepare, train
from shared_utils import checkpoint
from shared_utils.config import load_json
from shared_utils.errors import InputError

WIDTH, PROMPTS, PATCH = 64, 4, 4


@pytest.fixture(scope="module")
def cfg(digits_run: Path) -> TrainConfig:
    """Of the run whose prompts are pruned: 4 prompts in each of 2 layers."""
    return load_json(TrainConfig, digits_run / "config.json")


@pytest.fixture(scope="module")
def setup(cfg: TrainConfig) -> Setup:
    return prepare(cfg)


@pytest.fixture(scope="module")
def trained(digits_run: Path, setup: Setup) -> PromptedModel:
    return e2vpt.load(digits_run, setup.backbone.module)


def pruning(cfg: TrainConfig, source: Path, seed: int = 0, **options: Any) -> TrainConfig:
    run = replace(cfg.run, seed=seed, name="pruned")
    return replace(cfg, prune=PruneConfig(source=str(source), **options), run=run)


def build(cfg: TrainConfig, setup: Setup) -> tuple[PromptedModel, start.Scores | None]:
    spec = build_spec(cfg.model, setup.splits.num_classes)
    module = setup.backbone.module
    network, scores = start.build_network(cfg, spec, module, setup.splits, setup.fabric)
    return network.eval(), scores


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return checkpoint.load_weights(folder / name)[0]


def rows_of(state: dict[str, Tensor]) -> list[Tensor]:
    return [state[f"visual.weight.{layer}"] for layer in range(2)]


def lowest_go(scores: Tensor, count: int) -> list[int]:
    """Positions that stay when the `count` lowest go, one at a time."""
    left = list(range(len(scores)))
    for _ in range(count):
        left.remove(min(left, key=lambda i: float(scores[i])))
    return left


def survivors_of(trained: PromptedModel, stays: list[list[int]]) -> PromptedModel:
    """The trained model with these prompts alone in each layer."""
    spec = replace(trained.spec, num_visual_prompts=len(stays[0]))
    fewer = PromptedModel(trained.backbone, spec)
    state = {name: p.detach() for name, p in trained.named_parameters()}
    with torch.no_grad():
        for name, parameter in fewer.named_parameters():
            if name.startswith("visual."):
                parameter.copy_(state[name][stays[int(name[-1])]])
            elif not name.startswith("backbone."):
                parameter.copy_(state[name])
    return fewer.eval()


def images(setup: Setup, batch_size: int = 7) -> list[tuple[Tensor, Tensor]]:
    """The training images in order, without augmentation."""
    plain = setup.splits.train.with_augment("none")
    return list(torch.utils.data.DataLoader(plain, batch_size=batch_size))


# ---- which prompts stay, and with which values ----------------------------------------------


def test_initial_values_are_those_before_the_first_step(
    cfg: TrainConfig, setup: Setup, digits_run: Path
) -> None:
    network, scores = build(cfg, setup)
    assert scores is None
    initial, final = weights(digits_run, start.INITIAL), weights(digits_run)
    assert initial.keys() == final.keys()
    own = dict(network.named_parameters())
    for name, tensor in initial.items():
        assert torch.equal(tensor, own[name]), name
        assert not torch.equal(tensor, final[name]), name  # a step was taken


@pytest.mark.parametrize("rewind", ["init", "trained"])
@pytest.mark.parametrize(
    "options",
    [{}, {"per_layer": True}, {"interleaved": True}, {"per_layer": True, "interleaved": True}],
)
def test_survivors_get_the_values_they_had(
    cfg: TrainConfig,
    setup: Setup,
    trained: PromptedModel,
    digits_run: Path,
    rewind: Any,
    options: dict[str, bool],
) -> None:
    pruned = pruning(
        cfg, digits_run, num_tokens=2, num_segments=5, of_segments=8, rewind=rewind, **options
    )
    network, scores = build(pruned, setup)
    first = e2vpt.importance(trained, images(setup), 8, **options)
    assert scores is not None
    # The batches are others, so the sums are rounded otherwise.
    torch.testing.assert_close(scores["tokens"], first["tokens"], rtol=1e-4, atol=1e-9)
    per_layer = "per_layer" in options
    stays = [lowest_go(first["tokens"][i] if per_layer else first["tokens"], 2) for i in (0, 1)]
    second = e2vpt.importance(survivors_of(trained, stays), images(setup), 8, **options)
    state = weights(digits_run, start.INITIAL if rewind == "init" else "model.safetensors")
    for layer, before in enumerate(rows_of(state)):
        segments = second["segments"][layer] if per_layer else second["segments"]
        expected = torch.zeros(2, WIDTH)
        for row, prompt in enumerate(stays[layer]):
            for segment in lowest_go(segments[row], 5):
                dims = [
                    d
                    for d in range(WIDTH)
                    if (d % 8 if "interleaved" in options else d // 8) == segment
                ]
                expected[row, dims] = before[prompt, dims]
        assert torch.equal(network.visual.rows(layer), expected)
        assert network.visual.weight[layer].shape == (2, 3, WIDTH // 8)
    own = dict(network.named_parameters())
    for name in ("kv.key.0", "kv.key.1", "head.weight", "head.bias"):
        assert torch.equal(own[name], state[name]), name


@pytest.mark.parametrize("rewind", ["init", "trained"])
def test_nothing_removed_is_the_run_itself(
    cfg: TrainConfig, setup: Setup, digits_run: Path, rewind: Any
) -> None:
    network, _ = build(pruning(cfg, digits_run, rewind=rewind), setup)
    state = weights(digits_run, start.INITIAL if rewind == "init" else "model.safetensors")
    own = dict(network.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def test_reinit_draws_new_values_and_keeps_the_same_segments(
    cfg: TrainConfig, setup: Setup, digits_run: Path
) -> None:
    counts = {"num_tokens": 1, "num_segments": 5, "of_segments": 8}
    like, _ = build(pruning(cfg, digits_run, rewind="trained", **counts), setup)
    new, _ = build(pruning(cfg, digits_run, rewind="reinit", **counts), setup)
    again, _ = build(pruning(cfg, digits_run, rewind="reinit", **counts), setup)
    other, _ = build(pruning(cfg, digits_run, seed=1, rewind="reinit", **counts), setup)
    plain = torch.arange(3).expand(1, 3, 3)
    assert torch.equal(new.visual.segments, like.visual.segments)
    assert not torch.equal(new.visual.segments.long(), plain)  # what a new module would have
    before = weights(digits_run) | weights(digits_run, start.INITIAL)
    bound = math.sqrt(6 / (3 * PATCH**2 + WIDTH))
    for name, tensor in new.named_parameters():
        if name.startswith("backbone."):
            continue
        assert torch.equal(tensor, dict(again.named_parameters())[name]), name
        is_drawn = name != "head.bias"
        assert torch.equal(tensor, dict(other.named_parameters())[name]) is not is_drawn, name
        assert torch.equal(tensor, dict(like.named_parameters())[name]) is False, name
        if name.startswith("visual."):
            values = set(torch.cat([r.flatten() for r in rows_of(before)]).tolist())
            assert not values & set(tensor.flatten().tolist())
            assert 0.7 * bound < tensor.abs().max() <= bound


def test_segments_are_scored_when_the_tokens_are_gone(
    cfg: TrainConfig, setup: Setup, trained: PromptedModel, digits_run: Path
) -> None:
    counts = {"num_tokens": 1, "num_segments": WIDTH // 2, "of_segments": WIDTH}
    network, scores = build(pruning(cfg, digits_run, rewind="trained", **counts), setup)
    assert scores is not None
    stays = lowest_go(scores["tokens"], 1)
    second = e2vpt.importance(survivors_of(trained, [stays, stays]), images(setup, 40), WIDTH)
    torch.testing.assert_close(scores["survivors"], second["segments"], rtol=1e-4, atol=1e-9)
    once = scores["segments"][stays]
    assert not torch.allclose(scores["survivors"], once, rtol=0.01)
    kept = [[lowest_go(row, WIDTH // 2) for row in which] for which in (scores["survivors"], once)]
    assert network.visual.segments[0].tolist() == kept[0]
    assert kept[0] != kept[1]  # scoring once would keep others


@pytest.mark.parametrize("per_layer", [False, True])
def test_random_pruning_looks_at_nothing_but_the_seed(
    cfg: TrainConfig,
    setup: Setup,
    digits_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    per_layer: bool,
) -> None:
    monkeypatch.setattr(start, "importance", None)  # it would fail if it were called
    options = {"num_tokens": 2, "num_segments": 5, "random": True, "per_layer": per_layer}

    def kept(seed: int) -> tuple[list[list[float]], list[Any]]:
        torch.manual_seed(seed + 100)  # the state that it finds does not matter
        network, scores = build(pruning(cfg, digits_run, seed=seed, **options), setup)
        assert scores is not None
        return network.visual.rows(0).tolist(), network.visual.segments.tolist()

    found = [kept(seed) for seed in (0, 1, 2, 3, 4, 5)]
    assert kept(0) == found[0]
    assert len({json.dumps(one) for one in found}) == 6
    assert len(found[0][1]) == (2 if per_layer else 1)


def test_compat_zeroes_by_signed_scores(
    cfg: TrainConfig, setup: Setup, trained: PromptedModel, digits_run: Path
) -> None:
    counts = {"num_tokens": 1, "num_segments": 2, "of_segments": 8}
    network, scores = build(pruning(cfg, digits_run, compat=True, **counts), setup)
    signed = e2vpt.importance(trained, images(setup), 8, compat=True)
    assert scores is not None
    torch.testing.assert_close(scores["tokens"], signed["tokens"], rtol=1e-3, atol=1e-8)
    assert "survivors" not in scores  # scored once, as there
    stays = lowest_go(signed["tokens"], 1)
    for layer, before in enumerate(rows_of(weights(digits_run, start.INITIAL))):
        expected = torch.zeros(PROMPTS, WIDTH)
        for prompt in stays:
            for segment in lowest_go(signed["segments"][prompt], 2):
                dims = slice(segment * 8, segment * 8 + 8)
                expected[prompt, dims] = before[prompt, dims]
        assert torch.equal(network.visual.rows(layer), expected)
    assert network.spec.num_visual_prompts == PROMPTS


def test_random_scores_fit_shallow_prompts(setup: Setup) -> None:
    spec = PromptSpec(num_classes=10, num_visual_prompts=4, num_kv_prompts=0, deep=False)
    model = PromptedModel(setup.backbone.module, spec)
    scores = start.random_scores(model, PruneConfig(source="x", per_layer=True), 0)
    assert e2vpt.prune(model, scores, num_tokens=3).visual.weight[0].shape == (1, WIDTH)


def test_scoring_looks_at_training_images_without_augmentation(
    cfg: TrainConfig, setup: Setup, trained: PromptedModel
) -> None:
    assert setup.splits.train.augment == "crop"
    loader = build_loader(setup.splits.train.with_augment("none"), cfg.data, train=False)
    expected = e2vpt.importance(trained, loader, 8)
    got = start.score(trained, setup.splits.train, cfg.data, PruneConfig())
    assert torch.equal(got["segments"], expected["segments"])


# ---- what the run folder says ---------------------------------------------------------------


def test_importance_json_tells_scores_and_purpose(
    cfg: TrainConfig, setup: Setup, digits_run: Path, tmp_path: Path
) -> None:
    pruned = pruning(cfg, digits_run, num_tokens=1, num_segments=2)
    folder = train(pruned, setup, tmp_path)
    told = json.loads((folder / start.IMPORTANCE).read_text())
    _, scores = build(pruned, setup)
    assert scores is not None
    assert told.pop("prune") == {
        "source": str(digits_run), "num_tokens": 1, "num_segments": 2, "of_segments": 8,
        "rewind": "init", "per_layer": False, "interleaved": False, "random": False,
        "compat": False,
    }  # fmt: skip
    assert told == {name: tensor.tolist() for name, tensor in scores.items()}
    assert {name: torch.tensor(told[name]).shape for name in told} == {
        "tokens": (4,), "segments": (4, 8), "survivors": (3, 8), "interleaved": (),
    }  # fmt: skip
    # What it began with is kept in turn, so that it can be pruned and rewound again.
    network, _ = build(pruned, setup)
    initial = weights(folder, start.INITIAL)
    own = dict(network.named_parameters())
    assert torch.equal(initial.pop("visual.segments"), network.visual.segments)
    assert all(torch.equal(own[name], tensor) for name, tensor in initial.items())


# ---- wrong input ----------------------------------------------------------------------------


def other_classes(cfg: TrainConfig, setup: Setup) -> tuple[TrainConfig, Setup]:
    names = setup.splits.class_names[:9]
    return cfg, replace(setup, splits=replace(setup.splits, class_names=names))


def changed(group: str, **options: Any) -> Callable[[TrainConfig, Setup], Any]:
    def change(cfg: TrainConfig, setup: Setup) -> tuple[TrainConfig, Setup]:
        return replace(cfg, **{group: replace(getattr(cfg, group), **options)}), setup

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_classes, r"^prune\.source: got a model of 10 classes, expected 9, those of the da"),
        (changed("model", num_visual_prompts=5), r"^model\.num_visual_prompts: got 5, expected 4"),
        (changed("model", method="vpt-deep"), r"^model\.method: got vpt-deep, expected e2vpt, as "),
        (changed("prune", num_tokens=4), r"^num_tokens: got 4, expected 0 to 3, so that one is l"),
        (changed("prune", of_segments=7), r"^num_segments: got 7, expected a divisor of the widt"),
        (changed("prune", source="nowhere"), r"^nowhere/model\.json: got no such file, .*finished"),
    ],
)
def test_what_cannot_be_pruned_is_one_line(
    cfg: TrainConfig,
    setup: Setup,
    digits_run: Path,
    tmp_path: Path,
    change: Callable[[TrainConfig, Setup], tuple[TrainConfig, Setup]],
    match: str,
) -> None:
    wrong, where = change(pruning(cfg, digits_run, num_tokens=1), setup)
    with pytest.raises(InputError, match=match) as caught:
        train(replace(wrong, run=replace(wrong.run, runs_dir=tmp_path)), where)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_run_without_prompts_has_none_to_prune(
    cfg: TrainConfig, setup: Setup, tmp_path: Path
) -> None:
    linear = replace(cfg, model=replace(cfg.model, method="linear"))
    folder = train(linear, setup, tmp_path)
    assert not (folder / start.INITIAL).exists()
    with pytest.raises(InputError, match=r"^prune\.source: got a model without visual prompts, "):
        train(pruning(linear, folder, num_tokens=1), setup, tmp_path)


def test_rewinding_wants_the_initial_values(
    cfg: TrainConfig, setup: Setup, digits_run: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((digits_run / name).read_bytes())
    match = r"^prune\.rewind: got init without .*initial\.safetensors, .*--prune\.rewind trained$"
    with pytest.raises(InputError, match=match):
        build(pruning(cfg, tmp_path, num_tokens=1), setup)
    build(pruning(cfg, tmp_path, num_tokens=1, rewind="trained"), setup)  # as it says
