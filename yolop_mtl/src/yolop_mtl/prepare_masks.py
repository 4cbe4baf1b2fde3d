"""Masks of a split, drawn from labelled polygons or rewritten from another form.

They go into the folders that YOLOP's downloads have, each file whole or not at all. What is there
stays, so that a command that was stopped goes on where it was.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_utils.errors import InputError, MissingFileError
from yolop_mtl.bdd100k import FOLDERS, IMAGE_ENDINGS, Scene, find_folders, read_scenes
from yolop_mtl.lanes import draw_areas
from yolop_mtl.mask_drawing import lane_mask, write_mask
from yolop_mtl.masks import AreaClasses, Kind, check_share, read_mask
from yolop_mtl.prepare_check import image_size
from yolop_mtl.progress import show_progress

# Where polygons may be, below the root; {} is the split. The files of boxes may hold them too.
POLYGONS: dict[str, tuple[str, ...]] = {
    "lane": ("labels/lane/polygons/lane_{}.json", *FOLDERS["boxes"]),
    "drivable": ("labels/drivable/polygons/drivable_{}.json", *FOLDERS["boxes"]),
}
SAMPLE = 200  # masks whose share of foreground is looked at before any is rewritten


class Written(NamedTuple):
    """How many masks were written, how many were there and stayed, images without polygons."""

    written: int
    kept: int
    unlabelled: int

    def __str__(self) -> str:
        text = f"{self.written} written"
        if self.kept:
            text += f", {self.kept} were there and stay (--overwrite replaces them)"
        if self.unlabelled:
            text += f", {self.unlabelled} images are in no label file"
        return text


def draw_masks(
    root: Path,
    target: Path,
    split: str,
    kind: Kind,
    *,
    width: float,
    classes: AreaClasses,
    overwrite: bool,
) -> Written:
    """Draw the masks of a split's images from their polygons.

    An image that a label file lists without polygons gets an empty mask; one that no file lists
    gets none, it is not labelled.

    Args:
        root: of the data set.
        target: where the folder of masks goes; mostly `root`.
        split: its name.
        kind: lane or drivable.
        width: of a lane, pixels at 1280 x 720.
        classes: what becomes of the alternative area.
        overwrite: replace masks that are there.

    Raises: MissingFileError where there is no label file; InputError where no image has such a
        polygon, and what `read_scenes` finds.
    """
    images = _images(root, split)
    files = _find_polygons(root, split, kind)
    folder = _mask_folder(target, split, kind)
    scenes = (scene for file in files for scene in read_scenes(file) if scene.name in images)
    written = kept = 0
    for scene in show_progress(scenes, len(images), f"{split}: {kind} masks drawn"):
        path = folder / f"{scene.name}.png"
        if path.exists() and not overwrite:
            kept += 1
            continue
        size = image_size(images[scene.name])
        if kind == "lane":
            mask = lane_mask(scene.lines, size, width=width)
        else:
            mask = draw_areas(scene.areas, size, classes=classes)
        write_mask(path, _values(mask, kind, classes))
        written += 1
    return Written(written, kept, len(images) - written - kept)


def convert_masks(
    root: Path,
    target: Path,
    split: str,
    kind: Kind,
    mask_format: str,
    *,
    classes: AreaClasses,
    overwrite: bool,
) -> Written:
    """Rewrite the masks of a split, of the named form, as YOLOP's.

    Args:
        root: of the data set.
        target: where the folder of masks goes; mostly `root`.
        split: its name.
        kind: lane or drivable.
        mask_format: form of the masks that are there.
        classes: what becomes of the alternative area.
        overwrite: replace masks that are there.

    Raises: InputError where the masks lie in the folder to be written, or have another form.
    """
    yolop, *official = (root / pattern.format(split) for pattern in FOLDERS[kind])
    source = next((path for path in (*official, yolop) if path.is_dir()), None)
    if source is None:
        return Written(0, 0, 0)
    folder = target / FOLDERS[kind][0].format(split)
    if source.resolve() == folder.resolve():
        if mask_format == "binary":  # they have YOLOP's form already
            return Written(0, len(list(source.glob("*.png"))), 0)
        do = f"give --out, or move them to {FOLDERS[kind][1].format(split)}"
        raise InputError(str(source), "masks that would replace themselves", "others", do)
    files = sorted(source.glob("*.png"))
    if not files:
        raise InputError(str(source), "no mask", "one or more", "remove the folder")
    rows = np.unique(np.linspace(0, len(files) - 1, min(SAMPLE, len(files))).astype(int))
    # Every fourth pixel will do to tell the forms apart.
    some = [read_mask(files[row], kind, mask_format)[::4, ::4] for row in rows]
    check_share(kind, mask_format, some)
    folder.mkdir(parents=True, exist_ok=True)
    written = kept = 0
    for file in show_progress(files, len(files), f"{split}: {kind} masks rewritten"):
        if (folder / file.name).exists() and not overwrite:
            kept += 1
            continue
        mask = read_mask(file, kind, mask_format, classes=classes)
        write_mask(folder / file.name, _values(mask, kind, classes))
        written += 1
    return Written(written, kept, 0)


def link_data(root: Path, out: Path, splits: Sequence[str], *, written: Collection[Kind]) -> None:
    """Link the images, labels and masks of splits into another folder, where they are not yet.

    Args:
        root: of the data set.
        out: the other folder.
        splits: their names.
        written: kinds of masks that will be written there, and are not linked.

    Raises: InputError where a link cannot be made.
    """
    for split in splits:
        for role, path in find_folders(root, split).items():
            if role in written:
                continue
            link = out / path.relative_to(root)
            try:
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(path.resolve(), target_is_directory=path.is_dir())
            except OSError as error:
                do = "choose another folder, or leave out away"
                raise InputError("out", error, "a folder where links can be made", do) from error


def _images(root: Path, split: str) -> dict[str, Path]:
    folder = find_folders(root, split)["images"]
    found = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_ENDINGS}
    if not found:
        raise InputError(str(folder), "no image", "one or more", "check root and splits")
    return found


def _find_polygons(root: Path, split: str, kind: Kind) -> list[Path]:
    """The first label file, or the files of the first folder, with polygons of a kind."""
    tried = [root / pattern.format(split) for pattern in POLYGONS[kind]]
    existing = [path for path in tried if path.exists()]
    if not existing:
        wanted = " or ".join(pattern.format(split) for pattern in POLYGONS[kind])
        do = f"download BDD100K's {kind} labels, or leave --draw-{kind} out"
        raise MissingFileError("root", f"'{root}' without {wanted}", "a label file", do)
    for path in existing:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        scenes = (scene for file in files for scene in read_scenes(file))
        if any(_has_polygons(scene, kind) for scene in scenes):
            return files
    do = f"download BDD100K's {kind} labels, or leave --draw-{kind} out"
    raise InputError(str(existing[0]), f"no {kind} polygon", "one or more", do)


def _has_polygons(scene: Scene, kind: Kind) -> bool:
    return bool(scene.lines if kind == "lane" else scene.areas)


def _mask_folder(target: Path, split: str, kind: Kind) -> Path:
    folder = target / FOLDERS[kind][0].format(split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("out", error, "a folder to write", "choose another --out") from error
    return folder


def _values(mask: NDArray[np.uint8], kind: Kind, classes: AreaClasses) -> NDArray[np.uint8]:
    """Class numbers as the file holds them: 0 and 255, or the numbers where there are three."""
    if kind == "drivable" and classes == "three":
        return mask
    return mask * np.uint8(255)
