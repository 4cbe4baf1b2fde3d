"""What a run starts from: new prompts, or those of a finished run, pruned and rewound.

Paper: Han et al., E²VPT, ICCV 2023, Sec. 3.4.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from e2vpt import model_io
from e2vpt.config import DataConfig, ModelConfig, PruneConfig, TrainConfig
from e2vpt.data import DataSplits, ImageSet, build_loader
from e2vpt.model import PromptedModel, PromptSpec, load_tuned_state, tuned_state
from e2vpt.pruning import Scores, importance, prune
from shared_utils import checkpoint
from shared_utils.config import from_dict, load_json
from shared_utils.errors import InputError
from shared_utils.seeding import seed_all

INITIAL = "initial.safetensors"  # in a run folder: prompts and head before the first step
IMPORTANCE = "importance.json"
REINIT = 2**31  # added to the seed for new values of prompts that were pruned


def build_network(
    cfg: TrainConfig, spec: PromptSpec, module: Any, splits: DataSplits, fabric: Fabric
) -> tuple[PromptedModel, Scores | None]:
    """The network of a run before its first step, and the scores its prompts were pruned by.

    A backbone that trains or carries adapters is copied, so that others may use it too. For a
    resumed run the sizes come from its checkpoint, and the values are not set yet.

    Raises: InputError where the source of the prompts is not there, has other classes or another
        model than `cfg`, or has not so much to prune.
    """
    if spec.backbone_trains != "none" or spec.adapter != "none":
        module = copy.deepcopy(module)
    seed_all(cfg.run.seed)
    if not cfg.prune.source:
        return PromptedModel(module, spec), None
    if cfg.run.resume:
        state, _ = checkpoint.load_last(Path(cfg.run.resume) / "last.ckpt")
        return PromptedModel(module, from_dict(PromptSpec, state["spec"], "last.ckpt spec")), None
    _require_same_model(cfg.model, Path(cfg.prune.source))
    trained = model_io.load(cfg.prune.source, module)
    if trained.spec.num_classes != splits.num_classes:
        raise InputError(
            "prune.source",
            f"a model of {trained.spec.num_classes} classes",
            f"{splits.num_classes}, those of the data",
            "name a run on this data",
        )
    if trained.visual is None:
        raise InputError(
            "prune.source",
            "a model without visual prompts",
            "some to prune",
            "name a run of e2vpt or vpt",
        )
    fabric.to_device(trained)
    return _pruned(cfg, trained, splits.train)


def _pruned(
    cfg: TrainConfig, trained: PromptedModel, images: ImageSet
) -> tuple[PromptedModel, Scores]:
    """Tokens by the scores of the trained model, then segments by those of the survivors."""
    options, seed = cfg.prune, cfg.run.seed

    def scores_of(model: PromptedModel) -> Scores:
        if options.random:
            return random_scores(model, options, seed)
        return score(model, images, cfg.data, options)

    first = scores_of(trained)
    begin = _at_start(trained, options) if options.rewind == "init" else trained
    if options.compat:
        counts = (options.num_tokens, options.num_segments)
        return _rewound(prune(begin, first, *counts, compat=True), cfg), first
    fewer, begin = (prune(model, first, options.num_tokens) for model in (trained, begin))
    if options.num_segments:
        second = scores_of(fewer)
        begin = prune(begin, second, 0, options.num_segments)
        first = {**first, "survivors": second["segments"]}
    return _rewound(begin, cfg), first


def score(model: PromptedModel, images: ImageSet, data: DataConfig, options: PruneConfig) -> Scores:
    """`importance` on a split, in order and without augmentation."""
    loader = build_loader(images.with_augment("none"), data, train=False)
    return importance(
        model,
        loader,
        options.of_segments,
        per_layer=options.per_layer,
        interleaved=options.interleaved,
        compat=options.compat,
    )


def random_scores(model: PromptedModel, options: PruneConfig, seed: int) -> Scores:
    """Scores that say nothing: the control that pruning by importance has to beat."""
    generator = torch.Generator().manual_seed(seed)
    layers = (model.visual.num_layers,) if options.per_layer and model.visual else ()
    shape = (*layers, model.spec.num_visual_prompts, options.of_segments)
    return {
        "tokens": torch.rand(shape[:-1], generator=generator, dtype=torch.float64),
        "segments": torch.rand(shape, generator=generator, dtype=torch.float64),
        "interleaved": torch.tensor(options.interleaved),
    }


def _require_same_model(model: ModelConfig, source: Path) -> None:
    """The prompts come as they are: an option that would change them must not pass unnoticed."""
    path = source / "config.json"
    if not path.is_file():
        return
    before = load_json(TrainConfig, path).model
    for name in (field.name for field in fields(ModelConfig)):
        # The backbone is told by its weights, wherever they lie.
        if name not in ("backbone", "architecture") and getattr(model, name) != getattr(
            before, name
        ):
            raise InputError(
                f"model.{name}",
                getattr(model, name),
                f"{getattr(before, name)}, as in {source}",
                "leave it, or train new prompts",
            )


def require_same_pruning(options: PruneConfig, before: Mapping[str, Any]) -> None:
    """Raise InputError where a resumed run is to be pruned otherwise than it was.

    Args:
        options: those given now.
        before: those in its checkpoint. The source may lie elsewhere by now.
    """
    for name, value in asdict(options).items():
        began_with = before[name]
        if name == "source":
            value, began_with = Path(value).name, Path(began_with).name
        if value != began_with:
            told = f"{began_with or 'nothing'}, as before"
            raise InputError(f"prune.{name}", value or "nothing", told, "leave it")


def _at_start(trained: PromptedModel, options: PruneConfig) -> PromptedModel:
    """The model as it was before its first step."""
    path = Path(options.source) / INITIAL
    if not path.is_file():
        raise InputError(
            "prune.rewind",
            f"{options.rewind} without {path}",
            "the run's initial values",
            "give --prune.rewind trained",
        )
    state, _ = checkpoint.load_weights(path)
    model = PromptedModel(trained.backbone, trained.spec)
    load_tuned_state(model, state, str(path))
    return model


def _rewound(model: PromptedModel, cfg: TrainConfig) -> PromptedModel:
    """The pruned model; under `reinit` with new random values, its kept segments the same."""
    if cfg.prune.rewind != "reinit":
        return model
    # Not the run's own seed: where the source has the same, that would draw its values again.
    seed_all((cfg.run.seed + REINIT) % 2**32)
    fresh = PromptedModel(model.backbone, model.spec)
    if model.visual is not None and fresh.visual is not None and model.visual.segments is not None:
        fresh.visual.segments = model.visual.segments.clone()
    return fresh


def save_initial(network: PromptedModel, folder: Path) -> None:
    """Keep prompts and head as they are before the first step, for rewinding."""
    if network.visual is not None:
        checkpoint.save_weights(tuned_state(network), folder / INITIAL, {"format": "pt"})


def save_scores(scores: Scores, options: PruneConfig, folder: Path) -> None:
    """Write `importance.json`: the scores, and what they were used for.

    `tokens` (P,) and `segments` (P, R) are of the whole prompts, `survivors` (P', R) of the
    segments of those that stayed, where segments were pruned; all with a leading L under
    `per_layer`.
    """
    plain: dict[str, Any] = {name: tensor.tolist() for name, tensor in scores.items()}
    text = json.dumps({**plain, "prune": asdict(options)}, indent=1)
    checkpoint.write_text(text + "\n", folder / IMPORTANCE)
