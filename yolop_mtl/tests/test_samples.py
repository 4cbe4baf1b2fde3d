"""Files of a record read as one sample; what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolop_mtl.config import DataConfig
from yolop_mtl.model import TASKS
from yolop_mtl.records import Record
from yolop_mtl.samples import check_masks, check_records, read_image, read_sample

from .coloured_scenes import empty, scene, write
from .label_files import write_image

SIZE = (72, 128)
DATA = DataConfig()


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return write(tmp_path, "a", scene(0))


def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    for one, two in zip(read_sample(record, DATA, TASKS), scene(0), strict=True):
        assert np.array_equal(one, two)


def test_only_what_the_tasks_need_is_read(record: Record) -> None:
    gone = record._replace(drivable=Path("gone.png"))
    sample = read_sample(gone, DATA, ("lane",))
    assert (sample.boxes_xyxy, sample.labels, sample.drivable) == (None, None, None)
    assert sample.lane is not None
    with pytest.raises(FileNotFoundError, match=r"gone\.png: got no such file"):
        read_sample(gone, DATA, TASKS)


def test_what_is_not_labelled_is_none(record: Record) -> None:
    assert read_sample(Record(record.image), DATA, TASKS)[1:] == (None,) * 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_any_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)
    with Image.open(tmp_path / "a.png") as stored:
        assert (image == np.asarray(stored.convert("RGB"))).all()


def test_an_image_is_turned_as_its_exif_entry_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 250
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (32, 16, 3)
    assert (image[:16] > 200).all()
    assert (image[16:] < 50).all()


# ---- wrong files ----------------------------------------------------------------------------


def test_broken_images_are_named(tmp_path: Path, record: Record) -> None:
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: got no such file, expected an image"):
        read_image(tmp_path / "b.jpg")
    whole = tmp_path / "whole.jpg"
    Image.fromarray(scene(0).image).save(whole)
    for content in (b"", b"nothing", whole.read_bytes()[:5000], record.image.read_bytes()[:5000]):
        (tmp_path / "b.jpg").write_bytes(content)
        message = r"b\.jpg: got a damaged or unreadable file \([A-Z][^:]+\), expected a JPEG or PNG"
        with pytest.raises(ValueError, match=message) as caught:
            read_image(tmp_path / "b.jpg")
        assert "\n" not in str(caught.value)
    Image.fromarray(np.full((4, 6), 300, dtype=np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: got pixels of torch.uint16, expected 8 bits"):
        read_image(tmp_path / "c.png")


def test_masks_of_another_size_are_refused(tmp_path: Path, record: Record) -> None:
    lane = write_image(tmp_path / "small.png", 0, SIZE)
    message = r"small\.png: got 72 x 128 pixels, expected 720 x 1280 pixels as the image; give this"
    with pytest.raises(ValueError, match=message):
        read_sample(record._replace(lane=lane), DATA, TASKS)


def test_boxes_are_clipped_to_the_image_and_refused_outside(record: Record) -> None:
    labels = np.zeros(1, dtype=np.int64)
    over = np.array([[1200, 600, 1300, 700]], dtype=np.float32)
    sample = read_sample(record._replace(boxes_xyxy=over, labels=labels), DATA, TASKS)
    assert sample.boxes_xyxy.tolist() == [[1200, 600, 1280, 700]]
    wrong = record._replace(boxes_xyxy=over + np.float32(100), labels=labels)
    with pytest.raises(ValueError, match=r"a_image\.png: box: got .* the image of 1280 x 720 pix"):
        read_sample(wrong, DATA, TASKS)


# ---- checks before training -----------------------------------------------------------------


def test_the_form_of_masks_is_checked_over_the_set(tmp_path: Path) -> None:
    records = [write(tmp_path, str(seed), scene(seed)) for seed in range(3)]
    shares = check_masks(records, DATA, TASKS)
    assert shares["drivable"] == pytest.approx(
        np.mean([scene(s).drivable.mean() for s in range(3)])
    )
    assert shares["lane"] == pytest.approx(np.mean([scene(s).lane.mean() for s in range(3)]))
    assert list(check_masks(records, DATA, ("lane",))) == ["lane"]
    assert check_masks([Record(records[0].image)], DATA, TASKS) == {}
    # Official masks read as YOLOP's: 2 is background.
    for record in records:
        write_image(record.drivable, np.full(SIZE, 2), SIZE)
    with pytest.raises(ValueError, match=r"'binary': got 100\.0% foreground in 2 drivable masks"):
        check_masks(records, DATA, TASKS, num=2)


def test_an_image_without_any_label_is_named(record: Record) -> None:
    assert check_records([record, record._replace(lane=None)], TASKS, "train") == {
        "detection": 2, "drivable": 2, "lane": 1,
    }  # fmt: skip
    bare = Record(Path("bare.jpg"))
    with pytest.raises(ValueError, match=r"got 1 images without any label, first 'bare\.jpg'"):
        check_records([record, bare], TASKS, "train")
    # With masks alone it is labelled, but not for boxes.
    with pytest.raises(ValueError, match="got 1 images without any label"):
        check_records([record, record._replace(boxes_xyxy=None)], ("detection",), "train")
    with pytest.raises(ValueError, match="train: got no label for detection, drivable, lane, exp"):
        check_records([bare], TASKS, "train")
    with pytest.raises(ValueError, match=r"no image labelled for lane, .* out of model\.tasks"):
        check_records([record._replace(lane=None)], TASKS, "train")
    with pytest.raises(ValueError, match="train: got no image, expected one or more"):
        check_records([], TASKS, "train")


def test_an_image_labelled_empty_is_not_unlabelled(tmp_path: Path) -> None:
    record = write(tmp_path, "a", empty())
    sample = read_sample(record, DATA, TASKS)
    assert sample.boxes_xyxy.shape == (0, 4)
    assert not sample.lane.any()
    assert check_records([record], TASKS, "train")["detection"] == 1
