"""Backbones from classification runs, in mmseg's names."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors.torch import save_file

from dnc.mmseg.backbones import load_backbone
from shared_utils.errors import InputError, MissingFileError

SWIN = dict(
    type="SwinTransformer", embed_dims=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
    strides=(4, 2), out_indices=(0, 1), drop_path_rate=0.0,
)  # fmt: skip


def swin_of_timm() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(1, 2), num_classes=0,
    ).eval()  # fmt: skip


def built(config: dict[str, object]) -> torch.nn.Module:
    init_default_scope("mmseg")
    made = MODELS.build(config)
    made.eval()  # returns nothing in some of mmseg
    return made


def test_a_swin_of_timm_sees_the_same_in_mmseg(tmp_path: Path) -> None:
    source, backbone = swin_of_timm(), built(SWIN)
    save_file(
        {f"encoder.{k}": v.contiguous() for k, v in source.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    report = load_backbone(backbone, tmp_path)
    assert set(report.unexpected) == {"norm.weight", "norm.bias"}
    assert {name.split(".")[0] for name in report.missing} <= {"norm0", "norm1", "stages"}
    assert [
        name for name in report.missing if name.startswith("stages") and "index" not in name
    ] == []
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = source.layers[1](source.layers[0](source.patch_embed(images)))
        backbone.norm1 = torch.nn.Identity()
        found = backbone(images)[1]
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)


def test_a_resnet_of_timm_sees_the_same_in_mmseg(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("resnet18", num_classes=10).eval()
    backbone = built(dict(type="ResNet", depth=18, norm_eval=True))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "resnet.pth")
    report = load_backbone(backbone, tmp_path / "resnet.pth")
    assert report.missing == report.odd == ()
    assert set(report.unexpected) == {"fc.weight", "fc.bias"}
    assert str(report).startswith("120 tensors loaded; 2 unexpected (fc.weight, fc.bias)")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)[3], source.forward_features(images))


def test_what_does_not_match_is_refused(tmp_path: Path) -> None:
    backbone = built(dict(type="ResNet", depth=18))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.save({"other.weight": torch.ones(3)}, tmp_path / "other.pth")
    told = (
        r"other\.pth: got no weight of this backbone \(1 tensors: other\.weight, \.\.\.\), expected"
    )
    with pytest.raises(InputError, match=told):
        load_backbone(backbone, tmp_path / "other.pth")
    with pytest.raises(MissingFileError, match=r"gone\.pth: got no such file"):
        load_backbone(backbone, tmp_path / "gone.pth")
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
