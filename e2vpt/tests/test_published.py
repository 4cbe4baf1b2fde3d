"""Checkpoints of MAE, MoCo v3 and DINOv3, tiny ones made here in their authors' form."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import e2vpt
from e2vpt import backbones, model_io
from e2vpt.backbones import load_backbone
from e2vpt.model import PromptedModel, PromptSpec
from e2vpt.published import average_patches
from e2vpt.weight_files import load_file
from shared_utils.errors import InputError

WIDTH, DEPTH, SIDE = 24, 2, 32
MAE, MOCO = "vit_base_patch16_224.mae", "vit_base_patch16_224"


def encoder_state(width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """The names and shapes that both repositories' encoders have, by hand; no classifier."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    state = {
        "cls_token": values(1, 1, width),
        "pos_embed": torch.cat([torch.zeros(1, 1, width), values(1, 4, width)], dim=1),
        "patch_embed.proj.weight": values(width, 3, 16, 16),
        "patch_embed.proj.bias": values(width),
        "norm.weight": 1 + values(width),
        "norm.bias": values(width),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
        }.items():  # fmt: skip
            state[f"blocks.{i}.{name}"] = values(*shape)
    return state


def naive_tokens(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """The encoder as written in the papers, up to its last block: (B, 1 + patches, D)."""
    s, width = state, state["cls_token"].shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    patches = F.conv2d(
        images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16
    )  # (B, D, 2, 2)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1) + s["pos_embed"]
    for i in range(DEPTH):
        at = f"blocks.{i}."
        y = norm(x, f"{at}norm1")
        parts = F.linear(y, s[f"{at}attn.qkv.weight"], s[f"{at}attn.qkv.bias"])
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts.chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-2, -1) / (width / heads) ** 0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, s[f"{at}attn.proj.weight"], s[f"{at}attn.proj.bias"])
        y = F.gelu(
            F.linear(norm(x, f"{at}norm2"), s[f"{at}mlp.fc1.weight"], s[f"{at}mlp.fc1.bias"])
        )
        x = x + F.linear(y, s[f"{at}mlp.fc2.weight"], s[f"{at}mlp.fc2.bias"])
    return x


def mae_features(state: dict[str, Tensor], images: Tensor, heads: int = 3) -> Tensor:
    """Mean over the patches, then a norm that was never trained."""
    width = state["cls_token"].shape[-1]
    return F.layer_norm(naive_tokens(state, images, heads)[:, 1:].mean(dim=1), (width,), eps=1e-6)


def moco_features(state: dict[str, Tensor], images: Tensor, heads: int = 3) -> Tensor:
    """The class token behind the final norm."""
    width, x = state["cls_token"].shape[-1], naive_tokens(state, images, heads)[:, 0]
    return F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)


def decoder_state() -> dict[str, Tensor]:
    """Some of the names of MAE's decoder."""
    return {
        "mask_token": torch.randn(1, 1, 8),
        "decoder_pos_embed": torch.randn(1, 5, 8),
        "decoder_embed.weight": torch.randn(8, WIDTH),
        "decoder_embed.bias": torch.randn(8),
        "decoder_blocks.0.norm1.weight": torch.randn(8),
        "decoder_norm.bias": torch.randn(8),
        "decoder_pred.weight": torch.randn(768, 8),
    }


def moco_pretraining(width: int = WIDTH) -> dict[str, Any]:
    """A file of MoCo v3's pretraining: two encoders with projections, predictor, optimizer."""
    state = {f"module.base_encoder.{k}": v for k, v in encoder_state(width).items()}
    state |= {f"module.momentum_encoder.{k}": v for k, v in encoder_state(width, seed=9).items()}
    for encoder in ("base_encoder", "momentum_encoder"):
        state |= {
            f"module.{encoder}.head.0.weight": torch.randn(8, width),
            f"module.{encoder}.head.1.weight": torch.randn(8),
            f"module.{encoder}.head.1.running_mean": torch.randn(8),
            f"module.{encoder}.head.1.num_batches_tracked": torch.tensor(3),
        }
    state["module.predictor.0.weight"] = torch.randn(8, 8)
    optimizer = {"state": {0: {"mu": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": optimizer}


def moco_linear(arch: str = "vit_base", width: int = WIDTH) -> dict[str, Any]:
    """A file of MoCo v3's linear evaluation: one encoder with a classifier."""
    state = {f"module.{key}": value for key, value in encoder_state(width).items()}
    state["module.head.weight"] = torch.randn(1000, width)
    state["module.head.bias"] = torch.randn(1000)
    return {"epoch": 90, "arch": arch, "state_dict": state, "best_acc1": torch.tensor(76.0)}


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm build its ViT-B with tiny sizes, its ViT-S with its own width."""
    real = timm.create_model

    def create(name: str, **options: Any) -> Any:
        small = {"depth": DEPTH, "img_size": SIDE, "mlp_ratio": 4}
        if "_base_" in name:
            small |= {"embed_dim": WIDTH, "num_heads": 3}
        return real(name, **{**small, **options})

    monkeypatch.setattr(backbones.timm, "create_model", create)


def write(path: Path, content: dict[str, Any]) -> str:
    torch.save(content, path)
    return str(path)


class TestMAE:
    @pytest.mark.parametrize("has_decoder", [False, True])
    @torch.no_grad()
    def test_pools_patches_then_a_new_norm(self, tmp_path: Path, has_decoder: bool) -> None:
        state = encoder_state()
        content = {"model": {**state, **(decoder_state() if has_decoder else {})}, "epoch": 799}
        backbone = load_backbone(write(tmp_path / "mae_pretrain_vit_base.pth", content), MAE)
        vit: Any = backbone.module
        x = images()
        found = vit.forward_head(vit.forward_features(x), pre_logits=True)
        torch.testing.assert_close(found, mae_features(state, x), atol=1e-5, rtol=1e-5)
        assert backbone.mean == (0.485, 0.456, 0.406)
        assert (vit.global_pool, vit.num_classes) == ("avg", 0)
        assert vit.fc_norm.weight.eq(1).all()
        assert vit.fc_norm.bias.eq(0).all()

    @torch.no_grad()
    def test_prompts_are_averaged_only_when_asked(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mae.pth", {"model": encoder_state()})
        x, seen = images(), {}
        for pool_prompts in (False, True):
            torch.manual_seed(0)
            spec = PromptSpec(
                num_classes=3, num_visual_prompts=5, num_kv_prompts=2, pool_prompts=pool_prompts
            )
            model = PromptedModel(load_backbone(file, MAE).module, spec).eval()
            for norm in (model.backbone.fc_norm.weight, model.backbone.fc_norm.bias):
                assert not norm.requires_grad
            seen[pool_prompts] = model.features(x)
        assert (seen[True] - seen[False]).abs().max() > 1e-3

    def test_without_the_tag_it_is_timms(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mae.pth", {"model": encoder_state()})
        vit: Any = load_backbone(file, "vit_base_patch16_224").module
        assert vit.global_pool == "token"
        assert torch.equal(vit.norm.weight, encoder_state()["norm.weight"])

    def test_by_name_it_is_built_the_same(self) -> None:
        vit: Any = load_backbone(MAE, pretrained=False).module
        assert vit.global_pool == "avg"
        assert isinstance(vit.norm, torch.nn.Identity)

    def test_saved_prompts_find_their_backbone(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mae.pth", {"model": encoder_state()})
        backbone = load_backbone(file, MAE, img_size=(SIDE, SIDE))
        model = e2vpt.prompt(backbone.module, num_classes=3).eval()
        model_io.save(model, tmp_path / "saved", backbone=backbone)
        loaded = model_io.load(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(loaded(images()), model(images()))
        assert loaded.backbone.global_pool == "avg"

    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        file = write(tmp_path / "decoder.pth", {"model": decoder_state()})
        with pytest.raises(InputError, match=r"lacks cls_token.*; correct --model\.architecture"):
            load_backbone(file, MAE)
        finetuned = {**encoder_state(), "fc_norm.weight": torch.ones(WIDTH)}
        file = write(tmp_path / "mae_finetuned_vit_base.pth", {"model": finetuned})
        with pytest.raises(InputError, match=r"beyond it fc_norm\.weight"):
            load_backbone(file, MAE)

    @torch.no_grad()
    def test_average_patches_equals_timms_own_average_pooling(self) -> None:
        torch.manual_seed(0)
        options = {"depth": 2, "embed_dim": WIDTH, "num_heads": 3, "num_classes": 0, "img_size": 32}
        vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
        expected = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **options).eval()
        average_patches(vit)
        assert vit.state_dict().keys() == expected.state_dict().keys()
        expected.load_state_dict(vit.state_dict())
        assert torch.equal(vit(images()), expected(images()))
        assert vit.norm.__class__ is expected.norm.__class__
        assert vit.fc_norm.eps == expected.fc_norm.eps


class TestMoCoV3:
    @torch.no_grad()
    def test_pretraining_gives_the_base_encoder(self, tmp_path: Path) -> None:
        file = write(tmp_path / "vit-b-300ep.pth.tar", moco_pretraining())
        vit: Any = load_backbone(file, MOCO).module
        found = vit.forward_head(vit.forward_features(images()), pre_logits=True)
        expected = moco_features(encoder_state(), images())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        other = moco_features(encoder_state(seed=9), images())
        assert (other - expected).abs().max() > 0.1
        assert vit.num_classes == 0

    @torch.no_grad()
    def test_linear_evaluation_keeps_its_classifier(self, tmp_path: Path) -> None:
        content = moco_linear()
        vit: Any = load_backbone(
            write(tmp_path / "linear-vit-b-300ep.pth.tar", content), MOCO
        ).module
        state = content["state_dict"]
        expected = F.linear(
            moco_features(encoder_state(), images()),
            state["module.head.weight"],
            state["module.head.bias"],
        )
        torch.testing.assert_close(vit(images()), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["pretraining", "linear"])
    @torch.no_grad()
    def test_small_has_12_heads(self, tmp_path: Path, kind: str) -> None:
        content = moco_pretraining(384) if kind == "pretraining" else moco_linear("vit_small", 384)
        vit: Any = load_backbone(
            write(tmp_path / "vit-s-300ep.pth.tar", content), "vit_small_patch16_224"
        ).module
        found = vit.forward_head(vit.forward_features(images()), pre_logits=True)
        for heads, is_right in ((12, True), (6, False)):
            expected = moco_features(encoder_state(384), images(), heads)
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4) is is_right
        model = e2vpt.prompt(vit, num_classes=2, num_kv_prompts=3)
        assert model.kv.key[0].shape == (12, 3, 32)

    @pytest.mark.parametrize("why", ["learned position", "no arch"])
    def test_another_small_keeps_its_6_heads(self, tmp_path: Path, why: str) -> None:
        content = moco_linear("vit_small", 384)
        if why == "no arch":
            del content["arch"]
        else:
            content["state_dict"]["module.pos_embed"] += 0.1
        file = write(tmp_path / "w.pth.tar", content)
        vit: Any = load_backbone(file, "vit_small_patch16_224").module
        assert vit.blocks[0].attn.num_heads == 6

    def test_convolutional_stem_has_no_timm_model(self, tmp_path: Path) -> None:
        content = moco_linear("vit_conv_base")
        state = content["state_dict"]
        del state["module.patch_embed.proj.weight"]
        state["module.patch_embed.proj.0.weight"] = torch.randn(3, 3, 3, 3)
        with pytest.raises(InputError, match=r"does not fit vit_base.*it lacks patch_embed\.proj"):
            load_backbone(write(tmp_path / "linear-vit-conv-b.pth.tar", content), MOCO)


class TestDINOv3:
    def write(self, path: Path, bias: bool) -> tuple[Path, Any, str]:
        """A file in Meta's names made from a timm model; returns it with the model and its name."""
        name = "vit_small_patch16_dinov3" + "_qkvb" * bias
        torch.manual_seed(0)
        options = {"embed_dim": WIDTH, "num_heads": 2}
        vit: Any = backbones.timm.create_model(name, **options).eval()
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.normal_(std=0.2)
        theirs = {
            "mask_token": torch.zeros(1, WIDTH),
            "rope_embed.periods": torch.zeros(3),
            "local_cls_norm.weight": torch.ones(WIDTH),
        }
        renamed = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
        for key, value in vit.state_dict().items():
            for ours, other in renamed.items():
                key = key.replace(ours, other)
            if not key.endswith(("q_bias", "v_bias")):
                theirs[key] = value
        for i, block in enumerate(vit.blocks):
            zero, attn = torch.zeros(WIDTH), block.attn
            parts = (attn.q_bias, torch.ones(WIDTH), attn.v_bias) if bias else (zero, zero, zero)
            theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat(parts).detach()
            mask = torch.cat([zero + 1, zero, zero + 1])
            theirs[f"blocks.{i}.attn.qkv.bias_mask"] = mask
        torch.save(theirs, path)
        return path, vit, name

    @pytest.mark.parametrize("bias", [False, True])
    def test_as_published(
        self, tmp_path: Path, bias: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, vit, name = self.write(tmp_path / "w.pth", bias)
        found = backbones.timm.create_model(name, embed_dim=WIDTH, num_heads=2).eval()
        load_file(found, path, name)
        assert capsys.readouterr().out == ""
        with torch.no_grad():
            x = images()
            assert torch.equal(found.forward_features(x), vit.forward_features(x))

    def test_biases_are_not_dropped_in_silence(self, tmp_path: Path) -> None:
        path, _, _ = self.write(tmp_path / "w.pth", bias=True)
        name = "vit_small_patch16_dinov3"
        module = backbones.timm.create_model(name, embed_dim=WIDTH, num_heads=2)
        with pytest.raises(InputError, match=r"beyond it blocks\.0\.attn\.qkv\.bias.*dinov3_qkvb$"):
            load_file(module, path, name)
