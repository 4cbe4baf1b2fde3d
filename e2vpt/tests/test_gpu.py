"""On a CUDA device: it agrees with the CPU, stays finite in half precision, and saves memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from e2vpt.cli import main
from e2vpt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from e2vpt.micro_vit import build_micro_vit
from e2vpt.model import PromptedModel, PromptSpec
from e2vpt.predict import predict
from e2vpt.train import _Training, train
from shared_utils import checkpoint
from shared_utils.errors import Interrupted
from shared_utils.run_log import read_metrics

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
FORMS = {"cheap": {}, "token": {"token_form": True}, "shallow": {"deep": False}}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 products in float32, not TF32."""
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(kept[0])
    torch.backends.cudnn.allow_tf32 = kept[1]


def model_of(kind: str, **spec: Any) -> PromptedModel:
    """Always the same weights; dropout off, since its random numbers differ between devices."""
    torch.manual_seed(0)
    backbone = (
        build_micro_vit(0, embed_dim=64, depth=3, num_heads=1)
        if kind == "micro"
        else VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=0
        )
    )
    options = {"num_classes": 5, "num_visual_prompts": 6, "num_kv_prompts": 3}
    options |= {"prompt_dropout": 0.0, **spec}
    model = PromptedModel(backbone.eval(), PromptSpec(**options))
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5


def trainable(model: PromptedModel) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["micro", "class token"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_agree_with_the_cpu(kind: str, form: str) -> None:
    model, (images, _) = model_of(kind, **FORMS[form]).eval(), batch()
    with torch.no_grad():
        expected = model(images)
        found = model.to(DEVICE)(images.to(DEVICE)).cpu()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["micro", "class token"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_training_step_agrees_with_the_cpus(kind: str, form: str, optimizer: Any) -> None:
    gradients, stepped, started = [], [], []
    for device in (torch.device("cpu"), DEVICE):
        model, (images, labels) = model_of(kind, **FORMS[form]).to(device).train(), batch()
        parts = trainable(model)
        started.append({name: p.detach().cpu().clone() for name, p in parts.items()})
        steps = optimizer(parts.values(), lr=0.1)
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        gradients.append({name: p.grad.cpu() for name, p in parts.items()})
        steps.step()
        stepped.append({name: p.detach().cpu() for name, p in parts.items()})
    for name in gradients[0]:
        scale = float(gradients[0][name].abs().max())
        assert scale > 0
        torch.testing.assert_close(
            gradients[1][name], gradients[0][name], atol=1e-4 * scale, rtol=1e-3
        )
        assert not torch.equal(stepped[1][name], started[1][name])
        if optimizer is torch.optim.SGD:  # AdamW's first step has the gradient's sign only
            torch.testing.assert_close(
                stepped[1][name], stepped[0][name], atol=2e-5 * scale + 1e-7, rtol=1e-4
            )


def test_both_forms_agree() -> None:
    images = batch()[0].to(DEVICE)
    with torch.no_grad():
        cheap, token = (
            model_of("class token", token_form=form).to(DEVICE).eval()(images)
            for form in (False, True)
        )
    torch.testing.assert_close(cheap, token, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_finite_and_near(form: str, dtype: torch.dtype) -> None:
    model, (images, labels) = model_of("class token", **FORMS[form]).to(DEVICE).train(), batch()
    exact = model(images.to(DEVICE)).detach()
    with torch.autocast("cuda", dtype=dtype):
        logits = model(images.to(DEVICE)).float()
    assert torch.isfinite(logits).all()
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    F.cross_entropy(logits, labels.to(DEVICE)).backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# ---- runs -----------------------------------------------------------------------------------


def config(tmp_path: Path, backbone: Path, name: str, precision: Any) -> TrainConfig:
    return TrainConfig(
        recipe="digits",
        model=ModelConfig(
            backbone=str(backbone),
            architecture="micro_vit",
            num_visual_prompts=4,
            num_kv_prompts=2,
        ),
        data=DataConfig(limit=40, batch_size=16),
        optim=OptimConfig(lr=0.05, epochs=4, warmup_epochs=0),
        run=RunConfig(runs_dir=tmp_path, name=name, accelerator="gpu", precision=precision),
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resume_on_the_device(
    tmp_path: Path,
    tiny_backbones: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    """Two and two epochs are four, in float16 with its loss scale too.

    Sums on a GPU may be taken in any order, so that losses are near and not equal.
    """
    straight = train(config(tmp_path, tiny_backbones[0], "straight", precision))
    real = _Training._step

    def stopping(self: _Training, *args: Any) -> float:
        if self.step == 7:
            raise KeyboardInterrupt
        return real(self, *args)

    cfg = config(tmp_path, tiny_backbones[0], "stopped", precision)
    folder = tmp_path / "e2vpt" / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_step", stopping)
        with pytest.raises(Interrupted):
            train(cfg)
    scale = checkpoint.load(folder / "last.ckpt")["scaler"]
    assert bool(scale) == (precision == "16-mixed")
    torch.rand(5, device=DEVICE)  # the state of its random numbers is put back
    train(replace(cfg, run=replace(cfg.run, resume=str(folder))))
    one, other = ([row["loss_ce"] for row in read_metrics(place)] for place in (straight, folder))
    assert len(one) == 4
    assert other == pytest.approx(one, rel=2e-2)
    assert one[-1] < one[0]


def test_evaluate_and_predict_on_the_device(
    tmp_path: Path, tiny_backbones: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder = train(config(tmp_path, tiny_backbones[0], "run", "32-true"))
    capsys.readouterr()
    scores = []
    for accelerator in ("gpu", "cpu"):
        assert main(["evaluate", str(folder), "--accelerator", accelerator]) == 0
        scores.append([float(line.split()[1]) for line in capsys.readouterr().out.splitlines()])
    assert scores[0] == pytest.approx(scores[1], abs=0.026)  # one image of 40
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "a.png")
    tables = []
    for device in ("cuda", "cpu"):
        predict(folder, [str(tmp_path / "a.png")], tmp_path / device, device=device)
        line = (tmp_path / device / "predictions.csv").read_text().splitlines()[1]
        tables.append(float(line.split(",")[2]))
    assert tables[0] == pytest.approx(tables[1], abs=1e-3)


def test_a_step_takes_less_memory_than_full_fine_tuning() -> None:
    peaks = {}
    for trains in ("none", "full"):
        torch.manual_seed(0)
        backbone = VisionTransformer(
            img_size=64, patch_size=8, embed_dim=384, depth=6, num_heads=6, num_classes=0
        )
        counts = {"num_visual_prompts": 10, "num_kv_prompts": 5} if trains == "none" else {
            "num_visual_prompts": 0, "num_kv_prompts": 0,
        }  # fmt: skip
        spec = PromptSpec(num_classes=10, backbone_trains=trains, prompt_dropout=0, **counts)
        model = PromptedModel(backbone, spec).to(DEVICE).train()
        optimizer = torch.optim.AdamW(trainable(model).values())
        images, labels = torch.randn(16, 3, 64, 64, device=DEVICE), torch.arange(16) % 10
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels.to(DEVICE)).backward()
            optimizer.step()
        peaks[trains] = torch.cuda.max_memory_allocated()
        del model, optimizer, backbone
        torch.cuda.empty_cache()
    assert peaks["none"] < 0.8 * peaks["full"]
