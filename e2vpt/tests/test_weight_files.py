"""Weight files of every kind that is read, made here and tiny, whole and damaged."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from e2vpt import weight_files
from e2vpt.backbones import fingerprint, load_backbone
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


@torch.no_grad()
def assert_same_features(backbone, model, side: int = 160) -> None:
    found = backbone.module.forward_features(images(side))
    assert torch.equal(found, model.forward_features(images(side)))


class Payload:
    """Creates the file `ran` where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "ran",)


def save(path: Path, model: torch.nn.Module | dict) -> str:
    """Write a state dict to where the suffix says; returns the path as a user types it."""
    state = model if isinstance(model, dict) else model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def to_npz(model: VisionTransformer, **changes) -> dict[str, np.ndarray]:
    """Google's layout, written down from its description: HWIO, heads apart, kernels (in, out)."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads

    def numpy(x: Tensor) -> np.ndarray:
        return x.detach().numpy().copy()

    arrays = {
        "embedding/kernel": numpy(model.patch_embed.proj.weight.permute(2, 3, 1, 0)),
        "embedding/bias": numpy(model.patch_embed.proj.bias),
        "cls": numpy(model.cls_token),
        "Transformer/posembed_input/pos_embedding": numpy(model.pos_embed),
        "Transformer/encoder_norm/scale": numpy(model.norm.weight),
        "Transformer/encoder_norm/bias": numpy(model.norm.bias),
        "head/kernel": numpy(model.head.weight.T),
        "head/bias": numpy(model.head.bias),
    }
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}/"
        for theirs, ours in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays[f"{at}{theirs}/scale"] = numpy(ours.weight)
            arrays[f"{at}{theirs}/bias"] = numpy(ours.bias)
        attention = f"{at}MultiHeadDotProductAttention_1/"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for part, w, b in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = numpy(w.T.reshape(width, heads, -1))
            arrays[f"{attention}{part}/bias"] = numpy(b.reshape(heads, -1))
        arrays[f"{attention}out/kernel"] = numpy(block.attn.proj.weight.T.reshape(heads, -1, width))
        arrays[f"{attention}out/bias"] = numpy(block.attn.proj.bias)
        for j, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            arrays[f"{at}MlpBlock_3/Dense_{j}/kernel"] = numpy(layer.weight.T)
            arrays[f"{at}MlpBlock_3/Dense_{j}/bias"] = numpy(layer.bias)
    arrays.update(changes)
    return arrays


class TestStateDicts:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.PT", "w.bin", "w.pth.tar"])
    def test_round_trip(self, tmp_path, name):
        model = make_vit()
        path = tmp_path / name
        backbone = load_backbone(save(path, model), NAME)
        assert_same_logits(backbone, model)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert backbone.weights == f"{name} sha256:{digest[:12]}"
        assert (backbone.architecture, backbone.name) == (NAME, str(path))

    @pytest.mark.parametrize("wrapper", weight_files.WRAPPERS)
    def test_wrappers_and_prefixes(self, tmp_path, wrapper):
        model = make_vit()
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        content = {"epoch": 3, wrapper: state, "args": argparse.Namespace(lr=0.1)}
        assert_same_logits(load_backbone(save(tmp_path / "w.pth", content), NAME), model)

    def test_old_format_of_torch(self, tmp_path):
        model = make_vit()
        torch.save(model.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
        assert_same_logits(load_backbone(str(tmp_path / "w.pth"), NAME), model)

    @pytest.mark.parametrize("num_classes", [0, 7])
    def test_classifier_that_does_not_fit_is_left_out(self, tmp_path, num_classes):
        model = make_vit(num_classes=num_classes)
        backbone = load_backbone(save(tmp_path / "w.pth", model), NAME)
        assert_same_features(backbone, model)
        assert backbone.module.num_classes == 0
        assert backbone.sha256 == fingerprint(model)

    def test_classifier_of_an_architecture_without_one(self, tmp_path):
        model = make_vit("vit_tiny_patch16_224", num_classes=7)
        model.reset_classifier(7)
        name = "vit_tiny_patch16_224.augreg_in21k"
        assert timm.get_pretrained_cfg(name).num_classes == 21843
        backbone = load_backbone(save(tmp_path / "w.pth", model), name)
        assert backbone.module.num_classes == 0

    def test_tag_chooses_the_statistics(self, tmp_path):
        file = save(tmp_path / "w.pth", make_vit("deit_tiny_patch16_224"))
        assert load_backbone(file, "deit_tiny_patch16_224.fb_in1k").mean[0] == 0.485
        assert load_backbone(file, "vit_tiny_patch16_224").mean[0] == 0.5

    def test_other_grid_is_resampled(self, tmp_path):
        model = make_vit()
        backbone = load_backbone(save(tmp_path / "w.pth", model), NAME, img_size=(64, 96))
        model.set_input_size(img_size=(64, 96))
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            assert torch.allclose(backbone.module(x), model(x), atol=1e-5)

    def test_deit3_as_published(self, tmp_path):
        model = make_vit("deit3_small_patch16_224", depth=2, embed_dim=24, num_classes=0)
        theirs = {
            k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
            for k, v in model.state_dict().items()
        }
        assert "blocks.0.gamma_1" in theirs
        file = Path(save(tmp_path / "w.pth", {"model": theirs}))
        found = timm.create_model("deit3_small_patch16_224", depth=2, embed_dim=24)
        weight_files.load_file(found, file, "deit3_small_patch16_224")
        assert fingerprint(found) == fingerprint(model)

    def test_swin_as_published(self, tmp_path):
        """Merging layers at the end of a stage, buffers inside, another classifier."""
        name = "swin_tiny_patch4_window7_224"
        small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
        model = make_vit(name, num_classes=5, **small)
        theirs = {
            k.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): v
            for k, v in model.state_dict().items()
        }
        theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
        theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
        file = Path(save(tmp_path / "w.pth", {"model": theirs}))
        found = timm.create_model(name, **small)
        weight_files.load_file(found, file, name, ("head.fc",))
        assert fingerprint(found) == fingerprint(model)
        assert found.num_classes == 0

    def test_what_does_not_convert(self, tmp_path):
        state = make_vit().state_dict()
        state["pos_embed"] = torch.zeros(3)
        with pytest.raises(InputError, match=r"it does not convert .IndexError"):
            load_backbone(save(tmp_path / "w.pth", state), NAME)

    def test_left_and_missing_keys(self, tmp_path):
        state = make_vit().state_dict()
        more = {**state, **{f"decoder.{i}": torch.zeros(1) for i in range(5)}}
        with pytest.raises(InputError, match=r"beyond it decoder\.0, .*decoder\.2, \.\.\. \(5 in"):
            load_backbone(save(tmp_path / "w.pth", more), NAME)
        del state["norm.bias"]
        with pytest.raises(InputError, match=r"fit test_vit: it lacks norm\.bias \(1 in all\)"):
            load_backbone(save(tmp_path / "w.safetensors", state), NAME)

    def test_wrong_architecture(self, tmp_path):
        file = save(tmp_path / "w.pth", make_vit())
        with pytest.raises(
            InputError, match=r"not fit vit_tiny.*another shape cls_token \[1, 1, 64"
        ):
            load_backbone(file, "vit_tiny_patch16_224")
        with pytest.raises(InputError, match=r"model.architecture: got vit_tny.*did you mean"):
            load_backbone(file, "vit_tny_patch16_224")
        with pytest.raises(InputError, match=r"not fit test_resnet: it lacks conv1\.0\.weight"):
            load_backbone(file, "test_resnet")

    def test_architecture_is_needed(self, tmp_path):
        with pytest.raises(InputError, match=r"model\.architecture: got nothing, .* w\.pth; add"):
            load_backbone("w.pth")

    def test_absent_file(self, tmp_path):
        with pytest.raises(MissingFileError, match=r"w\.pth, which is not there"):
            load_backbone(str(tmp_path / "w.pth"), NAME)
        assert load_backbone("w.pth", NAME, pretrained=False).weights == "random"

    @pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 3}}, {}, {1: "x"}])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(InputError, match="export the state dict alone"):
            load_backbone(str(tmp_path / "w.pth"), NAME)

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("cut", [0, 1, 7, 200, 5000, -1, -300])
    def test_truncated(self, tmp_path, suffix, cut):
        whole = Path(save(tmp_path / f"whole.{suffix}", make_vit(num_classes=0))).read_bytes()
        (tmp_path / f"w.{suffix}").write_bytes(whole[:cut])
        with pytest.raises(InputError, match="damaged"):
            load_backbone(str(tmp_path / f"w.{suffix}"), NAME)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("old", [True, False])
    def test_damaged(self, tmp_path, old):
        """Every way in which changed bytes fail is an InputError, whatever torch.load raises."""
        path, rng = tmp_path / "w.pth", np.random.default_rng(0)
        torch.save({"a": torch.randn(4)}, path, _use_new_zipfile_serialization=not old)
        whole, failed = path.read_bytes(), 0
        for _ in range(300):
            changed = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 20)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed[: rng.integers(len(whole)) if rng.random() < 0.3 else None])
            try:
                weight_files._read_torch(path)
            except InputError:
                failed += 1
        assert failed > 200

    def test_flipped_bit_in_a_weight(self, tmp_path):
        path = Path(save(tmp_path / "w.pth", make_vit(num_classes=0)))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged .checksum of"):
            load_backbone(str(path), NAME)

    @pytest.mark.parametrize("old", [True, False])
    def test_code_does_not_run(self, tmp_path, old):
        torch.save(
            {"model": Payload(tmp_path)}, tmp_path / "w.pth", _use_new_zipfile_serialization=not old
        )
        with pytest.raises(
            InputError, match=r"more than tensors and plain data .getattr.*not open"
        ):
            load_backbone(str(tmp_path / "w.pth"), NAME)
        assert not (tmp_path / "ran").exists()


class TestNpz:
    def write(self, path: Path, arrays: dict[str, np.ndarray]) -> str:
        np.savez(path, **arrays)
        return str(path)

    def test_equals_the_module_it_was_made_from(self, tmp_path):
        model = make_vit()
        backbone = load_backbone(self.write(tmp_path / "w.npz", to_npz(model)), NAME)
        assert_same_logits(backbone, model)
        assert backbone.sha256 == fingerprint(model)

    def test_prefix_of_a_training_state(self, tmp_path):
        model = make_vit()
        arrays = {f"opt/target/{key}": value for key, value in to_npz(model).items()}
        arrays["opt/state/step"] = np.zeros(1)
        assert_same_logits(load_backbone(self.write(tmp_path / "w.npz", arrays), NAME), model)

    @pytest.mark.parametrize("what", ["other size", "absent", "behind pre_logits"])
    def test_classifier_is_left_out(self, tmp_path, what):
        model = make_vit(num_classes=7 if what == "other size" else 1000)
        arrays = to_npz(model)
        if what == "absent":
            del arrays["head/kernel"], arrays["head/bias"]
        if what == "behind pre_logits":
            arrays |= {"pre_logits/kernel": np.zeros((64, 64)), "pre_logits/bias": np.zeros(64)}
        backbone = load_backbone(self.write(tmp_path / "w.npz", arrays), NAME)
        assert_same_features(backbone, model)
        assert backbone.module.num_classes == 0
        assert all(p.isfinite().all() for p in backbone.module.parameters())

    def test_other_grid_is_resampled(self, tmp_path):
        model = make_vit()
        file = self.write(tmp_path / "w.npz", to_npz(model))
        found = load_backbone(file, NAME, img_size=(64, 64)).module.pos_embed
        grid = model.pos_embed[:, 1:].detach().reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (4, 4), mode="bilinear", antialias=False)
        assert torch.equal(found[:, :1], model.pos_embed[:, :1])
        assert torch.allclose(found[:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-6)

    def test_what_does_not_fit(self, tmp_path):
        model, path = make_vit(), tmp_path / "w.npz"
        deeper = to_npz(model)
        for i in (6, 7):
            deeper |= {key.replace("block_5", f"block_{i}"): value for key, value in deeper.items()}
        cases = [
            (deeper, r"beyond it Transformer/encoderblock_6/.*\(32 in all\)"),
            (
                to_npz(model, **{"Transformer/other/kernel": np.zeros(3)}),
                "it has beyond it Tr.*/other",
            ),
            (to_npz(make_vit(num_heads=4)), "it has 4 heads for 2"),
            (to_npz(make_vit(embed_dim=32)), "it has arrays that do not fit"),
            (to_npz(make_vit(depth=5)), "encoderblock_5/LayerNorm_0/scale"),
            ({"weight": np.zeros(3)}, "it lacks embedding/kernel"),
        ]
        for arrays, message in cases:
            with pytest.raises(InputError, match=message):
                load_backbone(self.write(path, arrays), NAME)

    def test_model_with_more_than_the_file(self, tmp_path):
        file = self.write(tmp_path / "w.npz", to_npz(make_vit()))
        module = timm.create_model(NAME, init_values=0.1)
        with pytest.raises(InputError, match=r"it lacks blocks\.0\.ls1\.gamma, .*\(12 in all\)"):
            weight_files.load_file(module, Path(file), NAME)
        with pytest.raises(InputError, match="beyond it cls"):
            weight_files.load_file(timm.create_model(NAME, class_token=False, global_pool="avg"),
                                   Path(file), NAME)  # fmt: skip
        with pytest.raises(InputError, match=r"a vision transformer for an .npz file"):
            load_backbone(file, "test_resnet")

    @pytest.mark.parametrize("cut", [0, 1, 100, 3000, -1, -100])
    def test_truncated(self, tmp_path, cut):
        whole = Path(self.write(tmp_path / "whole.npz", to_npz(make_vit()))).read_bytes()
        (tmp_path / "w.npz").write_bytes(whole[:cut])
        with pytest.raises(InputError, match="damaged"):
            load_backbone(str(tmp_path / "w.npz"), NAME)

    def test_flipped_bits(self, tmp_path):
        path = Path(self.write(tmp_path / "w.npz", to_npz(make_vit())))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_backbone(str(path), NAME)

    def test_code_does_not_run(self, tmp_path):
        payload = np.array([Payload(tmp_path)], dtype=object)
        for key in ("embedding/bias", "Transformer/encoderblock_0/LayerNorm_0/scale"):
            arrays = to_npz(make_vit(), **{key: payload})
            with pytest.raises(InputError, match="allow_pickle=False"):
                load_backbone(self.write(tmp_path / "w.npz", arrays), NAME)
        assert not (tmp_path / "ran").exists()
