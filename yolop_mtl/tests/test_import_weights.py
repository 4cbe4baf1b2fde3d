"""Weights of other files: files of exactly their structure, made here, give our network again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared_utils import checkpoint
from yolop_mtl import build_model, fuse, model_io
from yolop_mtl.cli import main
from yolop_mtl.import_weights import ImportConfig, build_by_order, import_weights
from yolop_mtl.model import YOLOPv2

from .networks import randomize
from .released_file import Released, network, trace, write_released
from .test_pretrained import foreign


def outputs(model: YOLOPv2, size: tuple[int, int] = (96, 64)) -> list[Tensor]:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = model(images)
    return [*raw["detection"], raw["drivable"], raw["lane"]]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


@pytest.fixture(scope="module")
def net() -> YOLOPv2:
    return network()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, net: YOLOPv2) -> Path:
    path = tmp_path_factory.mktemp("released") / "yolopv2.pt"
    write_released(net, path)
    return path


def take(path: Path, out: Path, **options: object) -> model_io.Deployed:
    config = {"preset": "nano", "trust_file": True} | options
    import_weights(ImportConfig(file=path, out=out, **config))
    return model_io.load(out)


def test_the_released_file_becomes_our_network(
    released: Path, net: YOLOPv2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["import-weights", str(released), "--out", str(out), "--preset", "nano", "--trust-file"]
    assert main(argv) == 0
    assert "112 convolutions loaded, outputs differ from the file's by at mo" in (
        capsys.readouterr().out
    )
    found = model_io.load(out)
    assert_same(outputs(found.model), outputs(net))
    assert found.model.detection.anchors.equal(net.detection.anchors)
    assert found.class_names[2:5] == ("class 2", "vehicle", "class 4")
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "model.safetensors"]


def test_norms_that_are_not_folded_and_other_names(net: YOLOPv2, tmp_path: Path) -> None:
    write_released(net, tmp_path / "x.pt", is_folded=False)
    names = tuple(f"kind {number}" for number in range(80))
    found = take(tmp_path / "x.pt", tmp_path / "out", class_names=names, img_size=(64, 96))
    assert found.class_names == names
    assert found.img_size == (64, 96)
    assert_same(outputs(found.model), outputs(net))


def test_one_class_is_kept(released: Path, net: YOLOPv2, tmp_path: Path) -> None:
    found = take(released, tmp_path / "out", keep_class=3)
    assert found.class_names == ("vehicle",)
    kept = [0, 1, 2, 3, 4, 8]
    wanted = [x.unflatten(1, (3, 85))[:, :, kept].flatten(1, 2) for x in outputs(net)[:3]]
    assert_same(outputs(found.model)[:3], wanted)


@pytest.mark.slow
def test_the_released_file_at_full_width(tmp_path: Path) -> None:
    net = network("release")
    write_released(net, tmp_path / "x.pt")
    found = take(tmp_path / "x.pt", tmp_path / "out", preset=None)
    card = json.loads((tmp_path / "out/model.json").read_text())
    assert card["model"]["preset"] == "release"
    assert_same(outputs(found.model), outputs(net))


def test_torchscript_is_not_loaded_unless_trusted(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    message = "got TorchScript, which carries code that runs .*, expected --trust-file"
    with pytest.raises(ValueError, match=message):
        take(released, tmp_path / "out", trust_file=False)
    assert not (tmp_path / "out").exists()


def test_vectors_merged_into_the_last_convolutions(net: YOLOPv2, tmp_path: Path) -> None:
    other = network()
    other.detection.merge_implicit()
    write_released(other, tmp_path / "x.pt")
    found = take(tmp_path / "x.pt", tmp_path / "out")
    assert_same(outputs(found.model), outputs(net))


@pytest.mark.parametrize(
    ("options", "output"), [({"has_sigmoid": False}, "drivable"), ({"is_swapped": True}, "detect")]
)
def test_a_network_that_computes_something_else_is_refused(
    net: YOLOPv2, options: dict[str, bool], output: str, tmp_path: Path
) -> None:
    write_released(net, tmp_path / "x.pt", **options)
    with pytest.raises(ValueError, match=rf"x\.pt {output}.*: got a difference of .* on noise, ex"):
        take(tmp_path / "x.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_layer_that_differs_is_named(released: Path, tmp_path: Path) -> None:
    message = (
        r"yolopv2\.pt model\.0\.conv: got a kernel \(8, 3, 3, 3\) with a bias, expected a kernel "
        r"\(16, 3, 3, 3\) with a norm, or a bias, for backbone\.stem\.0; name the network"
    )
    with pytest.raises(ValueError, match=message):
        take(released, tmp_path / "out", preset="small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(-1), "got 111 convolutions, expected 112, the next a kernel"),
        (lambda m: m.append(nn.Conv2d(2, 3, 1)), r"got a kernel \(3, 2, 1, 1\) with a bias, expe"),
        (lambda m: m.append(nn.Linear(2, 3)), r"got 3 tensors like model\.\d+\.wide"),
        (lambda m: m.append(nn.BatchNorm2d(3)), r"got 20 tensors like .*, expected 16 tensors li"),
        (lambda m: m.append(nn.PReLU()), r"\.weight: got a tensor \(1,\), expected no such ten"),
    ],
    ids=["gone", "convolution", "linear", "norm", "other"],
)
def test_more_or_fewer_layers_are_refused(
    change: Callable[[nn.Sequential], object], message: str
) -> None:
    file = Released(fuse(network()))
    change(file.model)
    with pytest.raises(ValueError, match=message):
        build_by_order(Path("x.pt"), "nano", file.state_dict(), torch.ones(3, 3, 2))


@pytest.mark.parametrize("kind", ["tensor", "two maps", "crash"])
def test_torchscript_of_another_network_is_refused(kind: str, tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, images: Tensor) -> object:
            if kind == "two maps":
                return ([images] * 2, [images] * 2), images, images
            return images

    if kind == "crash":
        trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 8, 8), tmp_path / "x.pt")
    else:
        trace(Other(), torch.zeros(1, 3, 8, 8), tmp_path / "x.pt")
    message = "TorchScript that does not run" if kind == "crash" else "other outputs"
    with pytest.raises(ValueError, match=rf"got {message} .*, expected outputs \[three maps, anch"):
        take(tmp_path / "x.pt", tmp_path / "out")


# ---- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_trunk(ending: str, tmp_path: Path) -> None:
    other = network()
    path = tmp_path / f"x{ending}"
    if ending == ".pt":
        checkpoint.save({"state_dict": foreign(other)}, path)
    else:
        checkpoint.save_weights(foreign(other), path, {})
    done = import_weights(ImportConfig(file=path, out=tmp_path / "out", preset="nano"))
    assert "70 convolutions loaded, 1 others left out; heads are new" in str(done)
    found = model_io.load(tmp_path / "out").model
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = (x.neck(*x.backbone(images)) for x in (found, other.eval()))
    for x, y in zip(ours.detection, theirs.detection, strict=True):
        assert x.equal(y)


def test_half_a_trunk_is_refused(tmp_path: Path) -> None:
    state = dict(list(foreign(network()).items())[:198])
    checkpoint.save(state, tmp_path / "x.pt")
    config = ImportConfig(file=tmp_path / "x.pt", out=tmp_path / "out", preset="nano")
    with pytest.raises(ValueError, match=r"got \d+ convolutions, expected 70, the next a kernel"):
        import_weights(config)
    checkpoint.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"got 1 tensors and no convolution, expected a network"):
        import_weights(config)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 2, "num_drivable": 3},
        {"tasks": ["lane"], "use_attention": False, "lane_upsample": "nearest"},
        {"tasks": ["detection"], "use_repconv": True},
        {"tasks": ["drivable"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_checkpoints_of_ours(options: dict[str, object], tmp_path: Path) -> None:
    other = randomize(build_model("nano", **options))
    checkpoint.save({"ema": {"model": other.state_dict()}}, tmp_path / "best.ckpt")
    found = take(tmp_path / "best.ckpt", tmp_path / "out").model
    assert found.tasks == other.tasks
    state = found.state_dict()
    assert all(state[name].equal(x) for name, x in other.state_dict().items())
    with pytest.raises(ValueError, match=r"out: got '.*', which has model\.safetensors"):
        take(tmp_path / "best.ckpt", tmp_path / "out")


def test_checkpoints_of_ours_that_do_not_fit(tmp_path: Path) -> None:
    state = build_model("nano").state_dict()
    for change, message in (
        ({}, r"backbone\.stem\.0\.conv\.weight: got \(8, 3, 3, 3\), expected \(32, 3, 3, 3\)"),
        ({"more": torch.zeros(1)}, r"more: got \(1,\), expected none"),
    ):
        checkpoint.save(state | change, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            take(tmp_path / "x.pt", tmp_path / "out", preset="nano" if change else None)
    trunk = {name: x for name, x in state.items() if name.startswith(("backbone", "neck"))}
    checkpoint.save(trunk, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="got a trunk alone, expected a network with a head"):
        take(tmp_path / "x.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_class": 80}, r"keep_class: got 80, expected one of 80 classes, from 0"),
        ({"class_names": ("car",)}, r"class_names: got 1 names, expected 80 for 80 classes"),
    ],
)
def test_classes_that_are_not_there(
    released: Path, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        take(released, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_wrong_files_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: got no such file, expected a file"):
        take(tmp_path / "nowhere.pt", tmp_path / "out")
    torch.save({"model": nn.Conv2d(1, 1, 1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"more than tensors and plain data, .*its state dict alo"):
        take(tmp_path / "x.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"img_size: got \(100, 640\), expected a height"):
        take(tmp_path / "x.pt", tmp_path / "out", img_size=(100, 640))
