"""What a fit takes of a training recipe, and what it leaves at its default."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from dnc.config import ModelConfig, TrainConfig
from dnc.fit_config import FitConfig
from dnc.fit_run import fit_run
from dnc.recipes import FIT_RECIPES, RECIPES
from shared_utils.config import load_json, save_json
from shared_utils.errors import InputError


@pytest.mark.parametrize("name", RECIPES)
def test_data_and_encoder_are_the_recipes(name: str) -> None:
    recipe, fit = RECIPES[name], FIT_RECIPES[name]
    assert fit.recipe == recipe.recipe == name
    for field in ("encoder", "stem", "embed_norm", "num_centroids", "temperature"):
        assert getattr(fit.model, field) == getattr(recipe.model, field)
    for field in ("source", "root", "img_size", "resize", "mean", "std", "batch_size", "groups"):
        assert getattr(fit.data, field) == getattr(recipe.data, field)
    assert fit.run.precision == recipe.run.precision
    assert fit.about != recipe.about
    assert str(recipe.data.img_size) in fit.about


def test_what_only_training_reads_stays_at_its_default() -> None:
    """Another head in the recipe would be saved as that of the sub-centroids that were fitted."""
    model = ModelConfig(encoder="resnet10t", head="softmax", logit_norm="affine", memory="bank")
    fit = FitConfig.of(TrainConfig(recipe="x", model=model))
    assert asdict(fit.model) == asdict(ModelConfig(encoder="resnet10t"))
    swin = FIT_RECIPES["imagenet-swin-small"]
    assert (swin.data.crop, swin.data.mixup, swin.data.randaugment) == ("none", 0.0, False)
    assert swin.optim == TrainConfig().optim


def test_a_saved_one_has_every_group_of_a_training_run(tmp_path: Path) -> None:
    """`dnc explain` and `dnc evaluate` read either."""
    path = tmp_path / "config.json"
    for fit in FIT_RECIPES.values():
        save_json(fit, path)
        assert load_json(FitConfig, path) == fit
    groups = {field.name for field in fields(TrainConfig)}
    assert {field.name for field in fields(FitConfig)} == groups | {"fit"}


def test_a_fit_is_not_resumed() -> None:
    fit = FitConfig.of(RECIPES["digits"])
    fit = replace(fit, run=replace(fit.run, resume="x"))
    with pytest.raises(InputError, match=r"^resume: got x, expected nothing; fit again: it takes"):
        fit_run(fit)
