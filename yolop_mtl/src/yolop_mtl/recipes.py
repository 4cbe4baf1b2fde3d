"""Configurations to start from. What they reach is in the README, with what it was measured on."""

from pathlib import Path

from yolop_mtl.augment_config import AugmentConfig
from yolop_mtl.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

SYNTHETIC = TrainConfig(
    recipe="synthetic",
    about="generated driving scenes, preset nano; under ten minutes on two cores",
    model=ModelConfig(preset="nano", anchors="auto"),
    data=DataConfig(
        source="synthetic",
        root=Path("runs/data/driving-scenes"),
        img_size=(192, 320),
        num_scenes=(600, 64),
        scene_size=(360, 640),
        batch_size=8,
        num_workers=1,
    ),
    augment=AugmentConfig(mosaic=0.0, mixup=0.0, close_mosaic=0, scale=0.2, translate=0.05),
    optim=OptimConfig(
        optimizer="adamw",
        lr=4e-3,
        final_lr=0.02,
        momentum=0.9,
        weight_decay=0.05,
        epochs=14,
        accumulate=1,
        warmup_epochs=1,
        warmup_steps=0,
        ema_decay=0.99,
    ),
    # On a CPU norms of a few channels take ten times as long channels-last.
    run=RunConfig(val_every=7, precision="bf16-mixed", channels_last=False),
)

# The paper's data, with the settings of its parents where its own are not known. Steps are of 64
# images: two batches of 32 on one device, or one on each of two.
BDD100K = TrainConfig(
    recipe="bdd100k",
    about="BDD100K (--data.root), preset base, 300 epochs at 640 pixels; days on a GPU",
    model=ModelConfig(preset="base"),
    data=DataConfig(num_workers=8),
    run=RunConfig(precision="bf16-mixed"),
)

RECIPES = {recipe.recipe: recipe for recipe in (SYNTHETIC, BDD100K)}
