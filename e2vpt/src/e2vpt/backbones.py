"""Pretrained backbones: the micro ViT that ships, timm names, and local weight files."""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg, get_deprecated_models
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from e2vpt.micro_vit import IMG_SIZE, PATCH_SIZE, build_micro_vit
from e2vpt.published import average_patches
from e2vpt.weight_files import WEIGHT_FILES, file_sha256, fill, first_line, load_file
from shared_utils import checkpoint
from shared_utils.errors import InputError, MissingFileError, near_miss

MICRO_VIT = "micro_vit"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order timm looks for them
HUB_TIMEOUT = 10.0  # seconds

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Backbone:
    """A pretrained network, on the CPU, float32, in eval mode, and how its input is to look.

    Attributes:
        module: the network with its classifier, or with `num_classes` 0 where none was loaded.
        name: what was asked for.
        architecture: `micro_vit`, or the timm name; of a file with the tag that was asked for.
        weights: `shipped`, `timm:<name.tag>`, a file name with its sha256 prefix, or `random`.
        img_size: (H, W) of the input in pixels.
        mean: of the pixels in 0 to 1, per channel in RGB order.
        std: of the pixels in 0 to 1, per channel in RGB order.
        sha256: `fingerprint(module)`.
    """

    module: nn.Module
    name: str
    architecture: str
    weights: str
    img_size: tuple[int, int]
    mean: RGB
    std: RGB
    sha256: str


def load_backbone(
    name: str,
    architecture: str = "",
    *,
    img_size: tuple[int, int] | None = None,
    pretrained: bool = True,
) -> Backbone:
    """Build a backbone and load its weights.

    MAE's (tag `mae`, as a name or as the architecture of a file) pool the mean of the patches and
    not, as timm builds them, the class token; see `published.average_patches`.

    Args:
        name: `micro_vit`, a timm name with or without a tag, or a weight file (`WEIGHT_FILES`).
        architecture: for a file, its timm name (a tag chooses pixel statistics and pooling), or
            `micro_vit` for the model.safetensors of `e2vpt pretrain` with model.json beside it.
        img_size: (H, W) to build for, the backbone's own by default; positional embeddings are
            resampled.
        pretrained: load weights; otherwise they are random, and no file is opened.

    Raises: InputError where a name is unknown, a file is missing, damaged, unsafe or of another
        architecture, or weights cannot be fetched.
    """
    if img_size is not None and min(img_size) < 1:
        raise InputError("data.img_size", img_size, "1 or more", "correct it")
    path = Path(name) if name.lower().endswith(WEIGHT_FILES) else None
    if path is None and architecture not in ("", name.partition(".")[0]):
        raise InputError(
            "model.architecture",
            architecture,
            f"nothing for the backbone {name}",
            "leave it out; it belongs to a weight file",
        )
    if path is not None and not architecture:
        raise InputError(
            "model.architecture",
            "nothing",
            f"the architecture of {name}",
            "add --model.architecture and a timm name, as vit_base_patch16_224",
        )
    if path is not None and pretrained and not path.is_file():
        raise MissingFileError(
            "model.backbone", f"{name}, which is not there", "a weight file", "check the path"
        )
    field, wanted = ("backbone", name) if path is None else ("architecture", architecture)
    if wanted == MICRO_VIT:
        built, (module, weights, mean, std) = MICRO_VIT, _load_micro_vit(path, pretrained)
        if img_size is not None:
            _resize_micro_vit(module, img_size)
        size = img_size or (IMG_SIZE, IMG_SIZE)
    else:
        built, cfg = _resolve(field, wanted)
        module, weights = _load_timm(built, cfg, path, img_size, pretrained)
        mean, std = _rgb(cfg.mean), _rgb(cfg.std)
        size = img_size or (cfg.input_size[-2], cfg.input_size[-1])
    module.eval()
    sha256 = fingerprint(module) if pretrained else ""
    # For a file its tag says how to build it again.
    described = built if path is None else wanted
    return Backbone(module, name, described, weights, size, mean, std, sha256)


@torch.no_grad()
def fingerprint(module: Any) -> str:
    """SHA-256 of the weights without the classifier: tells one backbone from another.

    Over name, shape and float32 bytes of parameters and persistent buffers, sorted by name. The
    classifier is what `get_classifier` gives, or `head` on a module without that method.
    """
    head = (
        module.get_classifier()
        if hasattr(module, "get_classifier")
        else getattr(module, "head", None)
    )
    layers = [h for h in (head if isinstance(head, tuple) else (head,)) if isinstance(h, nn.Module)]
    skipped = {id(p) for layer in layers for p in layer.parameters()}
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict(keep_vars=True).items()):
        if id(value) not in skipped:
            digest.update(f"{key} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().float().contiguous().reshape(-1).numpy())
    return digest.hexdigest()


def _assets() -> Path:
    return Path(str(resources.files("e2vpt").joinpath("assets")))


def _load_micro_vit(path: Path | None, pretrained: bool) -> tuple[nn.Module, str, RGB, RGB]:
    """The shipped micro ViT, or the one in a file with its card beside it."""
    if not pretrained:
        return build_micro_vit(), "random", _rgb(IMAGENET_DEFAULT_MEAN), _rgb(IMAGENET_DEFAULT_STD)
    file = path or _assets() / "micro_vit.safetensors"
    card_file = file.with_suffix(".json")
    if file.suffix.lower() != ".safetensors":
        raise InputError(
            "model.backbone",
            path,
            "a .safetensors file for micro_vit",
            "pass the model.safetensors that e2vpt pretrain wrote",
        )
    for needed in (file, card_file):
        if not needed.is_file():
            raise MissingFileError(
                "model.backbone",
                f"micro_vit without {needed}",
                "that file",
                "reinstall the package, or make it with: e2vpt pretrain",
            )
    try:
        card = json.loads(card_file.read_text())
        sha256, mean, std = str(card["sha256"]), _rgb(card["mean"]), _rgb(card["std"])
        sizes = {k: int(card["architecture"][k]) for k in ("num_classes", "embed_dim", "depth")}
    except (ValueError, LookupError, TypeError) as error:
        got = f"a damaged file ({type(error).__name__}: {first_line(error)})"
        raise InputError(str(card_file), got, "the card of e2vpt pretrain", "restore it") from error
    actual = file_sha256(file)
    if actual != sha256:
        raise InputError(
            str(file),
            f"sha256 {actual[:12]}",
            f"{sha256[:12]} as in {card_file.name}",
            "restore both files",
        )
    module = build_micro_vit(**sizes, num_heads=sizes["embed_dim"] // 64)
    fill(module, checkpoint.load_weights(file)[0], file, MICRO_VIT)
    return module, "shipped" if path is None else f"{file.name} sha256:{actual[:12]}", mean, std


def _resize_micro_vit(module: Any, img_size: tuple[int, int]) -> None:
    """Set another input size; the positional embedding is resampled (bicubic)."""
    _check_multiple(img_size, (PATCH_SIZE, PATCH_SIZE))
    patch, grid = module.patch_embed, (img_size[0] // PATCH_SIZE, img_size[1] // PATCH_SIZE)
    if grid == patch.grid_size:
        return
    old = module.pos_embed.detach()
    resampled = resample_abs_pos_embed(old, list(grid), list(patch.grid_size), num_prefix_tokens=0)
    module.pos_embed = nn.Parameter(resampled)
    patch.img_size, patch.grid_size, patch.num_patches = img_size, grid, grid[0] * grid[1]


def _resolve(field: str, name: str) -> tuple[str, PretrainedCfg]:
    """A timm name with or without a tag -> its architecture and what timm knows of the weights."""
    name = get_deprecated_models().get(name) or name
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, [MICRO_VIT, *timm.list_models()], n=3)
        expected = {
            "backbone": f"micro_vit, a timm name or a file ({', '.join(WEIGHT_FILES)})",
            "architecture": "a timm name or micro_vit",
        }[field]
        remedy = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "timm.list_models() has all"
        )
        raise InputError(f"model.{field}", name, expected, remedy)
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{architecture}.*", include_tags=True)
        tags = [tagged.partition(".")[2] for tagged in known]
        raise InputError(
            f"model.{field}",
            f"{name}, whose tag '{tag}' timm does not know",
            f"a tag of {architecture}",
            near_miss(tag, tags),
        ) from error
    return architecture, cfg or PretrainedCfg(architecture=architecture)


def _load_timm(
    architecture: str,
    cfg: PretrainedCfg,
    path: Path | None,
    img_size: tuple[int, int] | None,
    pretrained: bool,
) -> tuple[nn.Module, str]:
    """Build a timm model and fill it from a file or with timm's own weights."""
    options: dict[str, Any] = {"pretrained_cfg": cfg.tag} if cfg.tag else {}
    if img_size is not None and cfg.fixed_input_size:  # others take any size as they are
        options["img_size"] = img_size
    if pretrained and path is None:
        module, weights = _fetch(architecture, cfg, options), f"timm:{_tagged(architecture, cfg)}"
    else:
        module, weights = timm.create_model(architecture, **options), "random"
    patch_size = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch_size is not None:
        _check_multiple(img_size, patch_size)
    if pretrained and path is not None:
        heads: Any = cfg.classifier or "head"  # a tuple in some families
        load_file(module, path, architecture, (heads,) if isinstance(heads, str) else tuple(heads))
        weights = f"{path.name} sha256:{file_sha256(path)[:12]}"
    if cfg.tag == "mae" and type(module) is VisionTransformer:
        average_patches(module)
    return module, weights


def _fetch(architecture: str, cfg: PretrainedCfg, options: dict[str, Any]) -> nn.Module:
    """Timm's own weights: from the cache, else from the network, else a word on how to get them."""
    name = _tagged(architecture, cfg)
    if not cfg.has_weights:
        others = timm.list_pretrained(f"{architecture}*")[:3]
        raise InputError(
            "model.backbone",
            f"{name}, which timm has no weights for",
            "a name with weights",
            f"try {', '.join(others)}"
            if others
            else f"pass --model.backbone FILE --model.architecture {name}",
        )
    repo, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else HUB_FILES
    file = ""
    try:
        if repo:
            file = _from_hub(repo, names, revision or "main")
        return timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg_overlay={"file": file} if file else {},
            **options,
        )
    except (safetensors.SafetensorError, RuntimeError) as error:
        if not file:
            raise
        raise InputError(
            file,
            f"a file that does not load ({first_line(error)})",
            f"the weights of {name}",
            "delete it, and it is fetched again",
        ) from error
    except _network_errors() as error:
        source = f"{names[0]} from https://huggingface.co/{repo}" if repo else cfg.url
        raise InputError(
            "model.backbone",
            f"{name}, whose weights cannot be fetched ({first_line(error)})",
            "a network or the file",
            f"fetch {source} elsewhere, put it in any folder here, and pass it with "
            f"--model.backbone FILE --model.architecture {name}",
        ) from error


def _from_hub(repo: str, names: Iterable[str], revision: str) -> str:
    """The first of the files that the cache has, or else that the hub has. Raises: network errors.

    One request without retries asks whether the hub can be reached. Left to itself, its client
    tries twelve times before it gives up, which takes most of a minute.
    """
    cached = (huggingface_hub.try_to_load_from_cache(repo, n, revision=revision) for n in names)
    for found in cached:
        if isinstance(found, str):
            return found
    missing: Exception = FileNotFoundError(repo)
    for name in names:
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
        try:
            huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
        except EntryNotFoundError as error:
            missing = error
        else:
            return str(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    raise missing


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of the HTTP client that the hub's library is built on."""
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return (OSError, *(client.HTTPError for client in clients if client is not None))


def _tagged(architecture: str, cfg: PretrainedCfg) -> str:
    return f"{architecture}.{cfg.tag}" if cfg.tag else architecture


def _rgb(values: Iterable[float]) -> RGB:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _check_multiple(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if img_size[0] % patch_size[0] or img_size[1] % patch_size[1]:
        raise InputError(
            "data.img_size",
            f"{img_size[0]}x{img_size[1]}",
            f"multiples of the patch size {patch_size[0]}",
            "correct it",
        )
