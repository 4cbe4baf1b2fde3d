"""Weights from a file into a network: safetensors, PyTorch files, Google's `.npz`.

Nothing here ever runs code that a file carries: PyTorch files open weights-only, `.npz` without
pickle. All of a file must fit but its classifier; where that is absent or of another size, the
network is left without one (`num_classes` 0), never with a random one.
"""

import argparse
import hashlib
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from e2vpt.published import encoder_of, homeless_biases, is_moco_v3, set_moco_v3_heads
from shared_utils import checkpoint
from shared_utils.errors import InputError

WEIGHT_FILES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".pth.tar")
# Where training code keeps the weights in its file; averaged weights first, as timm prefers them.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "model",
    "state_dict",
    "model_state",
    "encoder",
)

# What damaged bytes were seen to raise in torch.load and np.load, other than UnpicklingError.
_DAMAGED = (
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
# What timm's reader of Google's files takes up, relative to the prefix of the image tower.
_NPZ_PLACED = re.compile(
    r"embedding/(kernel|bias)|cls|pos_embedding|Transformer/posembed_input/pos_embedding"
    r"|Transformer/encoder_norm/(scale|bias)|(head|pre_logits)/(kernel|bias)|MAPHead_0/.*"
    r"|(conv_root|gn_root|block\d+)/.*"
    r"|Transformer/encoderblock(_(?P<block>\d+))?/(LayerNorm_[012]/(scale|bias)"
    r"|MlpBlock_[013]/Dense_[01]/(kernel|bias)"
    r"|MultiHeadDotProductAttention_[01]/(query|key|value|out)/(kernel|bias))"
)
_NPZ_PREFIXES = ("", "opt/target/", "params/", "params/img/")


def load_file(
    module: nn.Module, path: Path, architecture: str, classifiers: tuple[str, ...] = ("head",)
) -> None:
    """Load a weight file into a timm model, in place; the file chooses the reader by its suffix.

    Args:
        module: built with random weights, at the input size that is wanted.
        path: `.safetensors` and PyTorch files in timm's names, in any that timm converts for this
            architecture, or as the authors of MAE and MoCo v3 publish theirs (a MoCo v3 ViT-S sets
            the model to its 12 heads); `.npz` as Google published its vision transformers.
        architecture: timm name without a tag.
        classifiers: names of the classifying layers, which may be absent or of another size.

    Raises: InputError where the file is damaged, holds more than plain data, or does not fit.
    """
    if path.suffix.lower() == ".npz":
        _fill_from_npz(module, path, architecture, classifiers)
        return
    arch: object = None  # what the training code of a PyTorch file called it
    if path.suffix.lower() == ".safetensors":
        state = checkpoint.load_weights(path)[0]
    else:
        state, arch = _read_torch(path)
    state = timm.models.clean_state_dict(state)  # prefixes of DDP and torch.compile
    if is_moco_v3(state, arch):
        set_moco_v3_heads(module)
    homeless, lost = homeless_biases(module, state)
    if lost:
        raise InputError(
            str(path),
            f"a file that does not fit {architecture}: it {_few('has beyond it', lost)}",
            "weights of that architecture",
            f"try --model.architecture {architecture}_qkvb",
        )
    state = {k: v for k, v in encoder_of(state).items() if k not in homeless}
    fill(module, _to_timm(module, state, path, architecture), path, architecture, classifiers)


def fill(
    module: Any,
    state: Mapping[str, Tensor],
    path: Path,
    architecture: str,
    classifiers: tuple[str, ...] = ("head",),
) -> None:
    """Load a state dict in timm's names and shapes; see `load_file`."""
    own: dict[str, Tensor] = module.state_dict()
    heads = {f"{name}.{part}" for name in classifiers for part in ("weight", "bias")}
    own_heads = heads & own.keys()
    fits = all(key in state and state[key].shape == own[key].shape for key in own_heads)
    body = {k: v for k, v in state.items() if k not in heads or (fits and k in own_heads)}
    reshaped = [
        f"{key} {list(value.shape)} for {list(own[key].shape)}"
        for key, value in body.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = {
        "lacks": [key for key in own if key not in body and key not in heads],
        "has beyond it": [key for key in body if key not in own],
        "has in another shape": reshaped,
    }
    found = [_few(verb, keys) for verb, keys in problems.items() if keys]
    if found:
        raise _misfit(path, architecture, "; ".join(found))
    module.load_state_dict(body, strict=False)
    if not fits:
        module.reset_classifier(0)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened; its type where there is none."""
    text = str(error).strip().splitlines()
    return text[0][:160].rstrip(".: ") if text else type(error).__name__


def _read_torch(path: Path) -> tuple[dict[str, Tensor], object]:
    """A PyTorch file's state dict, out of its wrappers, and its `arch`. Never runs code in it."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at every checksum
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f"checksum of {part}")
        # Meta's and timm's training files keep their options as a Namespace: attributes only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _damaged(path, error) from error
        raise InputError(
            str(path),
            f"a file with more than tensors and plain data ({code[1]})",
            "a state dict that opens weights-only",
            "do not open it; export its state dict where it came from",
        ) from error
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    arch = content.get("arch") if isinstance(content, dict) else None
    while isinstance(content, dict):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict):
        raise InputError(
            str(path),
            f"a file with a {type(content).__name__}",
            "a state dict",
            "export the state dict alone",
        )
    if not content or not all(isinstance(content[key], Tensor) for key in content):
        raise InputError(
            str(path),
            f"a file with {', '.join(map(str, list(content)[:3])) or 'no keys'}",
            f"a state dict, plain or under {', '.join(WRAPPERS)}",
            "export the state dict alone",
        )
    return {str(key): value for key, value in content.items()}, arch


def _to_timm(
    module: nn.Module, state: dict[str, Tensor], path: Path, architecture: str
) -> Mapping[str, Tensor]:
    """Other names and shapes -> timm's, by timm's own conversion for the architecture."""
    family = sys.modules[timm.model_entrypoint(architecture).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    # An option that DeiT-3 sets; names of other families are not touched by it.
    option = "adapt_layer_scale"
    options = {option: True} if option in signature(convert).parameters else {}
    try:
        converted: Mapping[str, Tensor] = convert(state, module, **options)
    except (RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        got = f"does not convert ({type(error).__name__}: {first_line(error)})"
        raise _misfit(path, architecture, got) from error
    return converted


@torch.no_grad()
def _fill_from_npz(
    module: Any, path: Path, architecture: str, classifiers: tuple[str, ...]
) -> None:
    """Load Google's JAX layout by timm's reader.

    The reader passes over arrays without a place in the model, and leaves as it was what the file
    does not have; both are looked for here.
    """
    if not hasattr(module, "load_pretrained") or not hasattr(module, "blocks"):
        raise InputError(
            "model.architecture",
            architecture,
            "a vision transformer for an .npz file",
            "name the one that the file is of",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("not an archive")
            problem, has_pre_logits = _compare_npz(module, file)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    if problem:
        raise _misfit(path, architecture, problem)
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    try:
        module.load_pretrained(str(path))  # opens it with allow_pickle=False
    except (zlib.error, zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    except (
        KeyError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:  # absent, or another shape
        raise _misfit(
            path, architecture, f"has arrays that do not fit ({first_line(error)})"
        ) from error
    unset = [key for key, value in module.named_parameters() if value.isnan().all()]
    missing = [key for key in unset if key.rpartition(".")[0] not in classifiers]
    if missing:
        raise _misfit(path, architecture, _few("lacks", missing))
    if (
        unset or has_pre_logits
    ):  # behind pre_logits, a layer timm leaves out, a classifier is no use
        module.reset_classifier(0)


def _compare_npz(module: Any, file: Any) -> tuple[str, bool]:
    """What does not fit ("" if nothing), and whether a layer comes before the classifier."""
    prefix = next((p for p in _NPZ_PREFIXES if f"{p}embedding/kernel" in file), None)
    if prefix is None:
        return "lacks embedding/kernel", False
    names = {key.removeprefix(prefix): key for key in file.files if key.startswith(prefix)}
    depth, num_heads = len(module.blocks), module.blocks[0].attn.num_heads
    homes = {
        "cls": module.cls_token,
        "MAPHead_0": module.attn_pool,
        "Transformer/encoder_norm": getattr(module.norm, "weight", None),
    }
    homeless = tuple(part for part, home in homes.items() if home is None)
    places = {name: _NPZ_PLACED.fullmatch(name) for name in names}
    unplaced = [
        names[name]
        for name, place in places.items()
        if place is None or int(place["block"] or 0) >= depth or name.startswith(homeless)
    ]
    if unplaced:
        return _few("has beyond it", unplaced), False
    stacked = names.get("Transformer/encoderblock/LayerNorm_0/scale")
    if stacked and len(file[stacked]) != depth:
        return f"has {len(file[stacked])} blocks for {depth}", False
    queries = [
        key for name, key in names.items() if name.endswith("query/kernel") and "block" in name
    ]
    if queries and file[queries[0]].shape[-2] != num_heads:
        return f"has {file[queries[0]].shape[-2]} heads for {num_heads}", False
    return "", any(name.startswith("pre_logits/") for name in names)


def _few(verb: str, keys: list[str]) -> str:
    return f"{verb} {', '.join(keys[:3])}{', ...' * (len(keys) > 3)} ({len(keys)} in all)"


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(
        str(path),
        f"a file cut off or damaged ({first_line(error)})",
        "a complete weight file",
        "fetch it again",
    )


def _misfit(path: Path, architecture: str, got: str) -> InputError:
    return InputError(
        str(path),
        f"a file that does not fit {architecture}: it {got}",
        "weights of that architecture",
        "correct --model.architecture or the file",
    )
