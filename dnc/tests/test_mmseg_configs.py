"""Every config builds, and has the parameters that it is known to have."""

from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from dnc.mmseg.config_files import dataset_configs, load_config, num_classes_of
from dnc.mmseg.owners import centroid_heads
from dnc.mmseg.segmentors import build_segmentor, count_parameters
from shared_utils.errors import InputError, MissingFileError

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = sorted(p for p in CONFIGS.glob("*.py") if not p.stem.startswith(("digit", "camvid")))
# Of mmsegmentation's own models with 150 classes, auxiliary head included; DNC lacks 76,950.
TOTALS = {
    "fcn_r101_ade20k": 68_590_732,
    "deeplabv3_r101_ade20k": 87_206_028,
    "deeplabv3plus_r101_ade20k": 62_682_876,
    "upernet_swin_b_ade20k": 121_279_716,
}
CLASSIFIER, AUXILIARY = 76_950, 38_550
CLASSES = {"ade20k": 150, "cityscapes": 19, "cocostuff10k": 171}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_config_of_a_table_builds_with_its_data_and_schedule(path: Path) -> None:
    cfg = load_config(path)
    is_softmax = path.stem.endswith("_softmax")
    (data,) = [name for name in CLASSES if name in path.stem]
    assert num_classes_of(cfg) == cfg.model.auxiliary_head.num_classes == CLASSES[data]
    assert cfg.train_cfg.max_iters == 160_000
    assert cfg.param_scheduler[-1].end == 160_000
    assert cfg.model.decode_head.type.startswith("DNC") != is_softmax
    crop = 769 if data == "cityscapes" else 512
    assert tuple(cfg.model.data_preprocessor.size) == (crop, crop)
    assert len(list(dataset_configs(cfg))) == 3
    batch = cfg.train_dataloader.batch_size * (8 if "swin" in path.stem else 4)
    assert batch == (8 if data == "cityscapes" else 16)
    assert cfg.custom_hooks[0].type == "CentroidHook"


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_of_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Swin reads numbers from a tensor, which one of the meta device has not.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        twin = build_segmentor(load_config(CONFIGS / f"{name}_softmax.py"))
        model = build_segmentor(load_config(CONFIGS / f"{name}.py"))
    softmax, dnc = count_parameters(twin), count_parameters(model)
    assert (softmax["total"], softmax["classifier"]) == (TOTALS[name], CLASSIFIER + AUXILIARY)
    assert (dnc["total"], dnc["classifier"]) == (TOTALS[name] - CLASSIFIER, AUXILIARY)
    head = model.decode_head.classifier
    assert (head.num_classes, head.num_centroids, head.embed_dim) == (150, 10, 512)


def test_the_auxiliary_head_without_a_classifier_too() -> None:
    cfg = load_config(CONFIGS / "fcn_r101_ade20k.py", ["model.auxiliary_head.type=DNCFCNHead"])
    with torch.device("meta"):
        model = build_segmentor(cfg)
    assert count_parameters(model)["total"] == 68_475_232
    assert len(centroid_heads(model)) == 2


@pytest.mark.parametrize("path", PAPER[::2], ids=lambda path: path.stem)
def test_a_config_and_its_twin_differ_in_the_classifier_alone(path: Path) -> None:
    ours, twin = (Config.fromfile(p) for p in (path, path.with_stem(f"{path.stem}_softmax")))
    assert ours.model.decode_head.pop("num_centroids") == 10
    assert ours.model.decode_head.type == f"DNC{twin.model.decode_head.type}"
    ours.model.decode_head.type = twin.model.decode_head.type
    assert ours.to_dict() == twin.to_dict()


def test_the_classifier_costs_what_its_products_cost() -> None:
    # Multiply-adds of the scores at 512 x 512, over those of a 1x1 convolution.
    for stride, expected in ((8, 2.831), (4, 11.325)):
        pixels = (512 // stride) ** 2
        extra = pixels * 512 * 150 * (10 - 1)
        assert extra / 1e9 == pytest.approx(expected, abs=1e-3)


def test_settings_are_changed_from_the_command_line() -> None:
    path = CONFIGS / "digitscenes_fcn.py"
    cfg = load_config(path, ["train_cfg.max_iters=7", "model.decode_head.num_centroids=3"], "there")
    assert (cfg.train_cfg.max_iters, cfg.model.decode_head.num_centroids) == (7, 3)
    assert {dataset.data_root for _, dataset in dataset_configs(cfg)} == {"there"}
    with pytest.raises(
        InputError, match=r"--cfg-options: got max_iters, expected KEY=VALUE; e\.g\."
    ):
        load_config(path, ["max_iters"])
    told = r"--cfg-options: got model\.type\.x=1, expected keys that fit the config"
    with pytest.raises(InputError, match=told):
        load_config(path, ["model.type.x=1"])


def test_what_is_no_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.py: got no such file, expected a config"):
        load_config(tmp_path / "gone.py")
    (tmp_path / "bad.py").write_text("model = dict(")
    with pytest.raises(InputError, match=r"bad\.py: got SyntaxError"):
        load_config(tmp_path / "bad.py")
    (tmp_path / "lost.py").write_text("_base_ = './gone.py'")
    with pytest.raises(InputError, match=r"lost\.py: got (FileNotFoundError|ConfigParsingError)"):
        load_config(tmp_path / "lost.py")
    (tmp_path / "headless.py").write_text("model = dict(type='EncoderDecoder')")
    with pytest.raises(InputError, match=r"model\.decode_head: got NoneType"):
        num_classes_of(load_config(tmp_path / "headless.py"))
