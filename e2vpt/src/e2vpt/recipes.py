"""Recipes of `e2vpt train`: each a row of a results table, with its command, cost and score."""

from dataclasses import replace

from e2vpt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

# The embedded default: scikit-learn's real digits on the micro ViT, both inside the packages.
# Prompts want large rates, and 800 images want crops. Expected: test_top1 0.93.
DIGITS = TrainConfig(
    recipe="digits",
    about="800 real digits on the shipped micro ViT; about 4 minutes on two cores",
    model=ModelConfig(num_visual_prompts=25, num_kv_prompts=12, prompt_dropout=0.0),
    data=DataConfig(source="digits", batch_size=32, resize="crop", augment="crop"),
    optim=OptimConfig(lr=0.05, epochs=70, warmup_epochs=2),
)

# The protocol of the paper's code for VTAB-size sets, on any images: SGD, base rate x batch / 256.
# Its grids are base rates 50 to 0.05 and decays 0.01 to 0; the values here are one point of them.
PAPER = TrainConfig(
    recipe="images",
    about="any image folder, CSV or packed set (--data.source) on ViT-B/16 IN-21k; a GPU is wise",
    model=ModelConfig(backbone="vit_base_patch16_224.augreg_in21k", parity_head=True),
    data=DataConfig(source="images", normalize="imagenet", batch_size=64, num_workers=2),
    optim=OptimConfig(
        optimizer="sgd", lr=5.0, scale_lr=True, weight_decay=1e-3, epochs=100, warmup_epochs=10
    ),
    run=RunConfig(precision="bf16-mixed"),
)

# The same images on the shipped backbone: a minute-scale try-out without a download.
MICRO = replace(
    DIGITS,
    recipe="images-micro",
    about="any image folder, CSV or packed set (--data.source) on the shipped micro ViT at 32x32",
    data=DataConfig(source="images", batch_size=32, resize="crop", augment="crop-flip"),
)

RECIPES = {cfg.recipe: cfg for cfg in (DIGITS, PAPER, MICRO)}
