"""CamVid: labels as they lie on disk, as the decoder sees them; the configs that use it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from dnc.mmseg.camvid import CamVid
from dnc.mmseg.config_files import load_config
from dnc.mmseg.folders import check_data
from dnc.mmseg.segmentors import build_segmentor, count_parameters
from shared_utils.errors import MissingFileError

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("camvid_fcn_r18", "camvid_deeplabv3_r18", "camvid_upernet_swin")


def write_set(folder: Path, labels: np.ndarray, suffix: str = ".png") -> None:
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        (folder / f"{part}annot").mkdir()
        image = np.full((*labels.shape, 3), 90, dtype=np.uint8)
        Image.fromarray(image).save(folder / part / f"a{suffix}")
        Image.fromarray(labels).save(folder / f"{part}annot" / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_unlabelled_are_ignored_and_classes_stay(tmp_path: Path, suffix: str) -> None:
    init_default_scope("mmseg")
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_set(tmp_path, labels, suffix)
    dataset = CamVid(
        data_root=str(tmp_path),
        img_suffix=suffix,
        data_prefix={"img_path": "val", "seg_map_path": "valannot"},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}],
    )
    expected = np.where(labels == 11, 255, labels)
    assert np.array_equal(dataset[0]["gt_seg_map"], expected)
    assert len(dataset.metainfo["classes"]) == len(dataset.metainfo["palette"]) == 11


@pytest.mark.parametrize("name", NAMES)
def test_a_config_and_its_twin_differ_in_the_classifier_alone(name: str) -> None:
    ours, twin = (Config.fromfile(CONFIGS / f"{n}.py") for n in (name, f"{name}_softmax"))
    assert ours.model.decode_head.pop("num_centroids") == 3
    assert ours.model.decode_head.pop("centroids") == {"warm_start": False}
    assert ours.model.decode_head.pop("embed_norm") is True
    assert ours.model.decode_head.type == f"DNC{twin.model.decode_head.type}"
    ours.model.decode_head.type = twin.model.decode_head.type
    assert ours.to_dict() == twin.to_dict()


def test_the_control_has_the_same_features_and_another_classifier() -> None:
    names = ("camvid_fcn_r18", "camvid_fcn_r18_softmax_norm")
    ours, control = (load_config(CONFIGS / f"{name}.py") for name in names)
    models = []
    for cfg in (ours, control):
        torch.manual_seed(0)
        models.append(build_segmentor(cfg).eval())
    one, other = (dict(model.named_parameters()) for model in models)
    conv = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert other.keys() - one.keys() == conv
    assert one.keys() < other.keys()
    assert count_parameters(models[1])["classifier"] == 1419
    models[0].load_state_dict(models[1].state_dict(), strict=False)
    torch.nn.init.normal_(models[1].decode_head.embed_norm.weight)
    models[0].decode_head.embed_norm = models[1].decode_head.embed_norm
    seen: list[torch.Tensor] = []
    for head, name in ((models[0].decode_head, "classifier"), (models[1].decode_head, "conv_seg")):
        part = getattr(head, name)
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 96, 128)
    for model in models:
        with torch.no_grad():
            assert model(images, mode="tensor").shape[:2] == (2, 11)
    torch.testing.assert_close(seen[0], seen[1])
    assert seen[0].std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_config_trains_a_step_of_its_data(name: str, tmp_path: Path) -> None:
    write_set(tmp_path, np.repeat(np.arange(12, dtype=np.uint8), 32)[None].repeat(288, 0))
    cfg = load_config(CONFIGS / f"{name}.py", data_root=str(tmp_path))
    check_data(cfg)
    model = build_segmentor(cfg)
    parameters = count_parameters(model)
    assert parameters["classifier"] == 0
    assert parameters["total"] < 16e6
    images = torch.randn(2, 3, 96, 128)
    assert model.eval()(images, mode="tensor").shape[:2] == (2, 11)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, np.zeros((4, 4), dtype=np.uint8))
    (tmp_path / "valannot/a.png").unlink()
    (tmp_path / "valannot").rmdir()
    cfg = load_config(CONFIGS / "camvid_fcn_r18.py", data_root=str(tmp_path))
    with pytest.raises(MissingFileError, match="val_dataloader seg_map_path: got no folder"):
        check_data(cfg)
