"""Groups of classes: a user's file, and the super-classes of CIFAR-100 that come along."""

import importlib.resources
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dnc.cli import main
from dnc.groups import grouped, load_groups
from dnc.recipes import RECIPES
from dnc.sources import Pool
from shared_utils.errors import InputError, MissingFileError

# As in the file `meta` of CIFAR-100, in its order, which is that of the labels.
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
""".split()
COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
people reptiles small_mammals trees vehicles_1 vehicles_2
""".split()
# `coarse_labels` of the files for each fine label: a second way to the same table.
COARSE_OF_FINE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3,
    15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0,
    17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19,
    2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip


def pool(labels: list[int], names: list[str]) -> Pool:
    return Pool(np.array(labels), names, lambda i: Image.new("RGB", (i + 1, 1)), lambda i: f"#{i}")


# ---- CIFAR-100 -------------------------------------------------------------------------------


def test_cifar100_has_twenty_groups_of_five() -> None:
    groups = load_groups(Path("cifar100"))
    assert sorted(groups) == FINE
    assert len(FINE) == 100
    assert Counter(groups.values()) == dict.fromkeys(COARSE, 5)


def test_each_class_of_cifar100_is_in_the_group_of_its_coarse_label() -> None:
    groups = load_groups(Path("cifar100"))
    assert [COARSE.index(groups[name]) for name in FINE] == COARSE_OF_FINE
    found = grouped({"train": pool(list(range(100)), FINE)}, Path("cifar100"))["train"]
    assert found.class_names == COARSE
    assert found.labels.tolist() == COARSE_OF_FINE


def test_the_table_lies_in_the_package() -> None:
    file = importlib.resources.files("dnc") / "class_groups" / "cifar100.json"
    assert json.loads(file.read_text(encoding="utf-8")) == load_groups(Path("cifar100"))


def cifar100(root: Path) -> Path:
    """Files of torchvision's form with the real names and noise for images."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for file, each in (("train", 3), ("test", 1)):
        labels = [i % 100 for i in range(100 * each)]
        data = rng.integers(0, 255, (len(labels), 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE}))
    return root


def test_the_recipe_trains_on_groups_and_looks_for_classes(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    argv = ["train", "cifar100-coarse-resnet50", "--runs-dir", str(tmp_path), "--name", "x"]
    argv += ["--data.root", str(cifar100(tmp_path / "data")), *quick, "--optim.epochs", "1"]
    argv += ["--model.encoder", "resnet10t", "--model.stem", "imagenet", "--data.limit", "100"]
    assert main(argv) == 0
    folder = tmp_path / "dnc" / "x"

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text())

    assert read("model.json")["class_names"] == COARSE
    assert read("config.json")["data"]["groups"] == "cifar100"
    result = read("result.json")
    assert result["data"]["test_images"] == 100
    # Of 100 test images of noise, one of each class, few are next to one of their class.
    assert 0 <= result["fine_retrieval_top1"] <= 0.2


def test_the_recipe_differs_in_its_groups_alone() -> None:
    coarse, fine = RECIPES["cifar100-coarse-resnet50"], RECIPES["cifar100-resnet50"]
    assert (coarse.model, coarse.optim, coarse.run) == (fine.model, fine.optim, fine.run)
    assert coarse.data.groups == Path("cifar100")
    assert coarse.data != fine.data


# ---- a user's file ---------------------------------------------------------------------------


def test_labels_follow_the_names_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"cat": "fur", "owl": "feathers", "dog": "fur", "more": 7}))
    pools = {"train": pool([0, 1, 2, 2], ["cat", "dog", "owl"]), "test": pool([1], ["cat"] * 3)}
    found = grouped(pools, path)
    assert found["train"].class_names == ["feathers", "fur"]
    assert found["train"].labels.tolist() == [1, 1, 0, 0]
    assert found["test"].labels.tolist() == [1]
    assert found["train"].image(3).size == (4, 1)
    assert found["train"].name(2) == "#2"
    assert pools["train"].labels.tolist() == [0, 1, 2, 2]
    assert load_groups(path)["more"] == "7"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    with pytest.raises(MissingFileError, match=r"groups\.json: got no such file, expected a JSON"):
        load_groups(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"groups\.json: got a damaged or unreadable file"):
        load_groups(path)
    path.write_text('["fur"]')
    match = r"^data\.groups: got .*groups\.json, a list, expected an object \{class: group\}; "
    with pytest.raises(InputError, match=match):
        load_groups(path)
    path.write_text('{"cat": "fur"}')
    pools = {"train": pool([0, 1], ["cat", "dog"])}
    match = r"^data\.groups: got no group for dog \(1 of 2 classes\), expected one for each class; "
    with pytest.raises(InputError, match=match):
        grouped(pools, path)
    with pytest.raises(InputError, match=r"no group for dog .*; add them to .*groups\.json$"):
        grouped(pools, path)
