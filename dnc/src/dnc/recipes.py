"""Configurations to start from, one per row of a table.

CIFAR and ImageNet follow the released configurations of the paper's code: optimiser, schedule,
batch, augmentation and pixel statistics. Accuracies are in the README, with what they were measured
on.
"""

from dataclasses import replace
from pathlib import Path

from dnc.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from dnc.fit_config import FitConfig

DIGITS = TrainConfig(
    recipe="digits",
    about="800 real digits, a small ResNet; about two minutes on two cores",
    model=ModelConfig(encoder="resnet10t", stem="imagenet", momentum=0.99),
    data=DataConfig(
        source="digits",
        img_size=32,
        crop="pad",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        batch_size=32,
    ),
    optim=OptimConfig(optimizer="adamw", lr=2e-3, weight_decay=0.05, epochs=30, warmup_epochs=2),
    run=RunConfig(precision="bf16-mixed"),
)

CIFAR10 = TrainConfig(
    recipe="cifar10-resnet50",
    about="the paper's protocol, 200 epochs; hours on a GPU",
    model=ModelConfig(encoder="resnet50", stem="cifar"),
    data=DataConfig(
        source="cifar10",
        crop="pad",
        flip=True,
        mean=(0.491400, 0.482157, 0.446500),
        std=(0.202300, 0.199400, 0.201000),
        batch_size=128,
    ),
    optim=OptimConfig(
        lr=0.1, weight_decay=1e-4, epochs=200, schedule="step", milestones=(100, 150)
    ),
)
CIFAR100 = TrainConfig(
    recipe="cifar100-resnet50",
    about="the paper's protocol, 200 epochs; hours on a GPU",
    model=CIFAR10.model,
    data=replace(
        CIFAR10.data,
        source="cifar100",
        mean=(0.507075, 0.486549, 0.440918),
        std=(0.267334, 0.256438, 0.276151),
    ),
    optim=OptimConfig(
        lr=0.1,
        weight_decay=5e-4,
        epochs=200,
        schedule="step",
        milestones=(60, 120, 160),
        gamma=0.2,
    ),
)
# The groups that come with CIFAR-100: can what no label told apart be found in the features?
CIFAR100_COARSE = replace(
    CIFAR100,
    recipe="cifar100-coarse-resnet50",
    about="its 20 super-classes, then the 100 classes within them are looked for; hours on a GPU",
    data=replace(CIFAR100.data, groups=Path("cifar100")),
)
IMAGES = TrainConfig(
    recipe="images",
    about="a folder of images or an .npz file (--data.source), ResNet-18 at 32 pixels",
    model=ModelConfig(encoder="resnet18"),
    data=DataConfig(source="images", crop="pad", flip=True, batch_size=64),
    optim=OptimConfig(lr=0.05, weight_decay=5e-4, epochs=30, warmup_epochs=1, nesterov=True),
)
IMAGENET = TrainConfig(
    recipe="imagenet-resnet50",
    about="ImageNet in image folders, 100 epochs of 8 x 32 images; take eight GPUs",
    model=ModelConfig(encoder="resnet50"),
    data=DataConfig(
        source="data/imagenet",
        img_size=224,
        resize=256,
        crop="resized",
        flip=True,
        batch_size=32,
        num_workers=8,
    ),
    optim=OptimConfig(
        lr=0.1, weight_decay=1e-4, epochs=100, schedule="step", milestones=(30, 60, 90)
    ),
    run=RunConfig(precision="bf16-mixed"),
)
# Mixing and smoothing of labels, which the released Swin configurations had lost, are in again.
IMAGENET_SWIN = TrainConfig(
    recipe="imagenet-swin-small",
    about="ImageNet in image folders, 300 epochs of 16 x 64 images; take sixteen GPUs",
    model=ModelConfig(encoder="swin_small_patch4_window7_224"),
    data=replace(
        IMAGENET.data, batch_size=64, randaugment=True, erasing=0.25, mixup=0.8, cutmix=1.0
    ),
    optim=OptimConfig(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        decay_norms=False,
        epochs=300,
        warmup_epochs=20,
        final_lr=0.01,
        label_smoothing=0.1,
        clip_grad=5.0,
    ),
    run=RunConfig(precision="bf16-mixed"),
)
IMAGENET_MOBILE = TrainConfig(
    recipe="imagenet-mobilenetv2",
    about="ImageNet in image folders, 300 epochs of 8 x 32 images; take eight GPUs",
    model=ModelConfig(encoder="torchvision/mobilenet_v2"),
    data=IMAGENET.data,
    optim=OptimConfig(lr=0.045, weight_decay=4e-5, epochs=300, schedule="exponential", gamma=0.98),
    run=RunConfig(precision="bf16-mixed"),
)

RECIPES = {
    recipe.recipe: recipe
    for recipe in (
        DIGITS,
        IMAGES,
        CIFAR10,
        CIFAR100,
        CIFAR100_COARSE,
        IMAGENET,
        IMAGENET_SWIN,
        IMAGENET_MOBILE,
    )
}
FIT_RECIPES = {name: FitConfig.of(recipe) for name, recipe in RECIPES.items()}
