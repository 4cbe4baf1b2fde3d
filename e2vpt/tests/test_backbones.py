"""Backbones from timm, from the package and from files, all made here and tiny."""

import hashlib
import json
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from e2vpt import backbones
from e2vpt.backbones import fingerprint, load_backbone
from e2vpt.micro_vit import build_micro_vit
from shared_utils.errors import InputError, MissingFileError

NAME = "test_vit"  # timm's own for tests: patch 16, width 64, depth 6, 2 heads, 160 px


def make_vit(name: str = NAME, seed: int = 1, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def images(side: int = 160) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(backbone, model, side: int = 160) -> None:
    assert torch.equal(backbone.module(images(side)), model(images(side)))


class Payload:
    """Creates the file `ran` where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "ran",)


def raise_(error: Exception) -> None:
    raise error


def write_micro(folder: Path, name: str, *, num_classes: int = 5, **sizes) -> torch.nn.Module:
    """A file and a card as `e2vpt pretrain` writes them."""
    torch.manual_seed(3)
    sizes = {"embed_dim": 64, "depth": 2, **sizes}
    model = build_micro_vit(num_classes, num_heads=sizes["embed_dim"] // 64, **sizes).eval()
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    file = folder / f"{name}.safetensors"
    save_file(half, file, {"format": "pt"})
    card = {
        "architecture": {**sizes, "num_classes": num_classes, "img_size": 32, "compile": False},
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "classes": ["a"] * num_classes,
        "val": {"top1": 0.3},
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (folder / f"{name}.json").write_text(json.dumps(card))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    return model


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "_assets", lambda: tmp_path)
    return tmp_path


class TestMicroViT:
    def test_shipped(self, assets):
        model = write_micro(assets, "micro_vit")
        backbone = load_backbone("micro_vit")
        assert_same_logits(backbone, model, 32)
        assert (backbone.weights, backbone.architecture) == ("shipped", "micro_vit")
        assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert backbone.img_size == (32, 32)
        assert backbone.sha256 == fingerprint(model)
        assert not backbone.module.training
        assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}

    def test_other_size(self, assets):
        write_micro(assets, "micro_vit")
        backbone = load_backbone("micro_vit", img_size=(48, 64))
        assert backbone.img_size == (48, 64)
        assert backbone.module(torch.randn(1, 3, 48, 64)).shape == (1, 5)
        with pytest.raises(InputError, match=r"data.img_size: got 33x32, expected multiples of"):
            load_backbone("micro_vit", img_size=(33, 32))

    def test_own_file_with_its_card(self, tmp_path):
        model = write_micro(tmp_path, "model")
        backbone = load_backbone(str(tmp_path / "model.safetensors"), "micro_vit")
        assert_same_logits(backbone, model, 32)
        assert backbone.weights.startswith("model.safetensors sha256:")
        (tmp_path / "model.pth").touch()
        with pytest.raises(InputError, match=r"expected a \.safetensors file for micro_vit"):
            load_backbone(str(tmp_path / "model.pth"), "micro_vit")

    def test_absent_asset(self, assets):
        with pytest.raises(MissingFileError, match=r"micro_vit\.safetensors.*e2vpt pretrain"):
            load_backbone("micro_vit")

    def test_random_needs_no_asset(self, assets):
        assert load_backbone("micro_vit", pretrained=False).weights == "random"

    def test_other_bytes_than_the_card_says(self, assets):
        write_micro(assets, "micro_vit")
        with (assets / "micro_vit.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(InputError, match=r"got sha256 .* as in micro_vit\.json"):
            load_backbone("micro_vit")

    @pytest.mark.parametrize("text", ["{", "{}", '{"sha256": "", "mean": 1}', "[]"])
    def test_damaged_card(self, assets, text):
        write_micro(assets, "micro_vit")
        (assets / "micro_vit.json").write_text(text)
        with pytest.raises(InputError, match=r"got a damaged file .* restore it"):
            load_backbone("micro_vit")


class TestTimmNames:
    def test_random(self):
        backbone = load_backbone(f"{NAME}.r160_in1k", pretrained=False)
        assert (backbone.architecture, backbone.weights) == (NAME, "random")
        assert (backbone.img_size, backbone.mean) == ((160, 160), (0.5, 0.5, 0.5))

    def test_other_size(self):
        backbone = load_backbone("vit_tiny_patch16_224", img_size=(32, 48), pretrained=False)
        assert backbone.module(torch.randn(1, 3, 32, 48)).shape == (1, 1000)
        with pytest.raises(InputError, match=r"data.img_size: got 40x32, expected multiples of"):
            load_backbone(NAME, img_size=(40, 32), pretrained=False)
        with pytest.raises(InputError, match=r"data.img_size"):
            load_backbone(NAME, img_size=(0, 32), pretrained=False)

    def test_size_free_architecture(self):
        backbone = load_backbone("test_resnet", img_size=(64, 64), pretrained=False)
        assert backbone.img_size == (64, 64)

    def test_unknown_names(self):
        with pytest.raises(
            InputError, match=r"model.backbone: got vit_bse_.*'vit_base_patch16_224'"
        ):
            load_backbone("vit_bse_patch16_224")
        with pytest.raises(InputError, match="did you mean 'micro_vit'"):
            load_backbone("micro-vit")
        with pytest.raises(InputError, match=r"timm\.list_models"):
            load_backbone("hf-hub:q/zzzzzzzzzz")
        with pytest.raises(InputError, match=r"whose tag 'r160' .*did you mean 'r160_in1k'"):
            load_backbone(f"{NAME}.r160")

    def test_architecture_without_a_file(self):
        with pytest.raises(
            InputError, match=r"model.architecture: got micro_vit, expected nothing"
        ):
            load_backbone(NAME, "micro_vit")
        assert load_backbone(NAME, NAME, pretrained=False).architecture == NAME

    def test_no_weights_published(self):
        with pytest.raises(InputError, match=r"test_vit4.r160_in1k, which timm has no weights for"):
            load_backbone("test_vit4")

    @pytest.mark.parametrize("error", [backbones._network_errors()[-1]("Name or service not known"),
                                       TimeoutError("timed out"), "offline mode"])  # fmt: skip
    def test_offline(self, monkeypatch, tmp_path, error):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        if error == "offline mode":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setattr(
                huggingface_hub, "get_hf_file_metadata", lambda *a, **k: raise_(error)
            )
        start = time.monotonic()
        with pytest.raises(InputError) as caught:
            load_backbone(NAME)
        assert time.monotonic() - start < 10
        message = str(caught.value)
        for part in (
            "model.backbone: got test_vit.r160_in1k, whose weights cannot be fetched",
            "fetch model.safetensors from https://huggingface.co/timm/test_vit.r160_in1k",
            "--model.backbone FILE --model.architecture test_vit.r160_in1k",
        ):
            assert part in message
        assert "\n" not in message

    def test_offline_by_url(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: raise_(OSError("no route")))
        with pytest.raises(InputError, match=r"\(no route\).*fetch https://github.com/.*gcvit_xxt"):
            load_backbone("gcvit_xxtiny")

    def test_cached_file_needs_no_network(self, monkeypatch, tmp_path):
        model = make_vit()
        cache = tmp_path / "models--timm--test_vit.r160_in1k"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("abc")
        (cache / "snapshots" / "abc").mkdir(parents=True)
        file = cache / "snapshots" / "abc" / "model.safetensors"
        save_file(model.state_dict(), file)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for request in ("get_hf_file_metadata", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, request, lambda *a, **k: pytest.fail("network"))
        backbone = load_backbone(NAME)
        assert_same_logits(backbone, model)
        assert backbone.weights == "timm:test_vit.r160_in1k"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(InputError, match=r"does not load .* delete it"):
            load_backbone(NAME)

    def test_second_hub_file_name(self, monkeypatch, tmp_path):
        model, asked = make_vit(), []
        torch.save(model.state_dict(), tmp_path / "w.bin")

        def metadata(url, **kwargs):
            asked.append(url.rpartition("/")[2])
            if asked[-1] == "model.safetensors":
                raise huggingface_hub.errors.LocalEntryNotFoundError("404")

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "w.bin")
        )
        assert_same_logits(load_backbone(NAME), model)
        assert asked == ["model.safetensors", "pytorch_model.bin"]
        torch.save({"model": Payload(tmp_path)}, tmp_path / "w.bin")
        with pytest.raises(InputError, match=r"does not load .weights_only=True blocked"):
            load_backbone(NAME)
        assert not (tmp_path / "ran").exists()


class TestFingerprint:
    def test_by_hand(self):
        module = torch.nn.Module()
        module.b = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        module.register_buffer("a", torch.tensor([[3]]))
        module.register_buffer("scratch", torch.zeros(9), persistent=False)
        module.head = torch.nn.Linear(2, 2)
        text = b"a (1, 1)\n" + np.float32(3).tobytes() + b"b (2,)\n" + np.float32([1, 2]).tobytes()
        assert fingerprint(module) == hashlib.sha256(text).hexdigest()

    def test_tells_weights_but_not_classifiers(self):
        model = make_vit()
        before = fingerprint(model)
        model.reset_classifier(3)
        assert fingerprint(model) == before == fingerprint(
            make_vit(num_classes=0).half().float()
        ) or (fingerprint(model) == before)
        with torch.no_grad():
            model.blocks[5].mlp.fc2.bias[0] += 1e-3
        assert fingerprint(model) != before

    def test_of_distilled_models_and_other_heads(self):
        for name in ("deit_tiny_distilled_patch16_224", "test_resnet"):
            model = make_vit(name)
            before = fingerprint(model)
            model.reset_classifier(3)
            assert fingerprint(model) == before

    def test_dtype_does_not_matter(self):
        model = make_vit().bfloat16()
        assert fingerprint(model) == fingerprint(model.float())
