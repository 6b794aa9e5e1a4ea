"""Folders of images: the class and the split of every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from PIL import Image

from cjepa_kernels.train.data.folder_listing import (
    class_name,
    identity,
    visible_entries,
    walk_files,
)
from cjepa_kernels.train.data.image_decoding import EncodedImage
from cjepa_kernels.train.data.split_names import (
    SPLIT_NAMES,
    ChosenSplits,
    choose_splits,
    listed,
    split_role,
)

# Pillow recognises these formats but cannot decode them, or starts another program for it.
_NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_LAYOUT = "expected PATH/<class>/* or PATH/train/<class>/* and PATH/test/<class>/*"


@dataclass(frozen=True)
class FolderImages:
    """The images of one split, in the order of their paths."""

    paths: Sequence[Path]
    classes: Sequence[str]

    def read(self, rows: Sequence[int]) -> Iterator[EncodedImage]:
        """Yield the images of some rows."""
        for row in rows:
            yield EncodedImage("data.source", str(self.paths[row]), self.paths[row])


@dataclass(frozen=True)
class ImageFolder:
    """What was found in a folder of images."""

    splits: dict[str, tuple[str, FolderImages]]  # "train" and perhaps "test": folder, images
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # sentences on what was left out


def has_image_suffix(file: Path) -> bool:
    """Whether a file's name is that of an image; the file is not opened."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    # An MPO file is a JPEG file with further pictures, and Pillow opens it as JPEG.
    return kind == "MPO" or (kind in Image.OPEN and kind not in _NOT_DECODED)


def list_image_folder(root: Path) -> ImageFolder:
    """List the images of a folder.

    A class is a folder, directly under the root or under a split's folder, and all images below it
    belong to it. A split is a folder directly under the root that has a split's whole name, if
    every folder beside it has one too. Nothing else about a name plays a role. Where it is not
    clear what the folder holds, a ValueError shows what was found.
    """
    if not root.is_dir():
        what = "a file, expected a directory" if root.exists() else "no directory"
        raise FileNotFoundError(f"data.source: {what}: {str(root)!r}")
    folders = _subfolders(root)
    if not folders:
        raise ValueError(_no_classes(root, root))
    named = [folder for folder in folders if split_role(folder.name)]
    if named and len(named) < len(folders):
        others = [folder for folder in folders if folder not in named]
        raise ValueError(
            f"data.source: {str(root)!r} holds {listed(_shown(named))} beside "
            f"{listed(_shown(others))}: either all folders are splits ({', '.join(SPLIT_NAMES)}) "
            f"or all are classes. Rename a split that is called otherwise; if all of them are "
            "classes, put them into one folder 'train'"
        )
    if named:
        _refuse_loose_images(root, "split")
        chosen = choose_splits({folder.name: folder for folder in named}, repr(str(root)))
    else:
        chosen = ChosenSplits({"train": (root.name, root)}, notes=())
    visited = {identity(root): root}
    left_out: Counter[str] = Counter()
    nested: list[str] = []
    splits = {}
    for part, (name, folder) in chosen.parts.items():
        classes = _subfolders(folder)
        if not classes:
            raise ValueError(_no_classes(root, folder))
        _refuse_loose_images(folder, "class")
        splits[part] = (name, _list_classes(classes, visited, left_out, nested))
    class_names = tuple(sorted(set(splits["train"][1].classes)))
    _check_classes(root, class_names)
    if "test" in splits:
        _refuse_shared_files(splits["train"][1], splits["test"][1])
    return ImageFolder(splits, class_names, (*chosen.notes, *_notes(left_out, nested)))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in visible_entries(folder) if entry.is_dir()]


def _images_in(folder: Path) -> list[Path]:
    return [
        entry for entry in visible_entries(folder) if has_image_suffix(entry) and entry.is_file()
    ]


def _shown(folders: Sequence[Path]) -> list[str]:
    return [f"{folder.name}/" for folder in folders]


def _refuse_loose_images(folder: Path, kind: str) -> None:
    loose = _images_in(folder)
    if loose:
        raise ValueError(
            f"data.source: {str(folder)!r} holds image files ({listed(f.name for f in loose)}) "
            f"beside its {kind} folders: {_LAYOUT}"
        )


def _no_classes(root: Path, folder: Path) -> str:
    images = _images_in(folder)
    if not images:
        names = [entry.name for entry in visible_entries(folder)]
        return f"data.source: no images in {str(folder)!r}: {_LAYOUT}, found {listed(names)}"
    hint = (
        "Training needs a class for every image, as a folder for each class, because the probes "
        "measure by the classes"
    )
    if folder != root:
        hint += (
            f". {folder.name!r} is read as a split; if it is a class, put all class folders into "
            f"one folder: {root / 'train' / folder.name}"
        )
    return (
        f"data.source: {str(folder)!r} holds {len(images)} images and no class folders: {_LAYOUT}. "
        + hint
    )


def _list_classes(
    classes: Sequence[Path],
    visited: dict[tuple[int, int], Path],
    left_out: Counter[str],
    nested: list[str],
) -> FolderImages:
    class_of: dict[Path, str] = {}
    for class_folder in classes:
        inner = _subfolders(class_folder)
        if inner and all(split_role(part.name) for part in inner):
            raise ValueError(
                f"data.source: the class folder {str(class_folder)!r} holds "
                f"{listed(_shown(inner))}: the split folders must lie directly under the "
                "folder that data.source names, and the class folders in them"
                + (f"; is 'imagefolder:{class_folder}' meant?" if len(classes) == 1 else "")
            )
        if inner:
            nested.append(f"{class_folder.name}/{inner[0].name}")
        before = len(class_of)
        for file in walk_files(class_folder, visited):
            if not has_image_suffix(file):
                left_out[file.suffix.lower() or file.name] += 1
            elif not S_ISREG(file.stat().st_mode):
                raise ValueError(f"data.source: {str(file)!r} is neither a file nor a folder")
            else:
                class_of[file] = class_name(class_folder)
        if len(class_of) == before:
            raise ValueError(
                f"data.source: no images in the class folder {str(class_folder)!r}, found "
                f"{listed(entry.name for entry in visible_entries(class_folder))}; remove the "
                "folder if it is no class"
            )
    paths = sorted(class_of, key=str)
    return FolderImages(paths, [class_of[path] for path in paths])


def _check_classes(root: Path, class_names: Sequence[str]) -> None:
    if len(class_names) > 1:
        return
    (only,) = class_names
    folder = root / only
    inner = [entry.name for entry in _subfolders(folder)] if folder.is_dir() else []
    hint = f"; is 'imagefolder:{folder}' meant?" if inner else ""
    raise ValueError(
        f"data.source: {str(root)!r} holds the images of one class ({only!r}), expected at least "
        f"two, because the probes measure by the classes{hint}"
    )


def _refuse_shared_files(train: FolderImages, test: FolderImages) -> None:
    known = {identity(file): file for file in train.paths}
    for file in test.paths:
        same = known.get(identity(file))
        if same is not None:
            raise ValueError(
                f"data.source: the test image {str(file)!r} is the same file as the training image "
                f"{str(same)!r}, by a link"
            )


def _notes(left_out: Counter[str], nested: Sequence[str]) -> list[str]:
    notes = []
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        notes.append(f"Files that are no images and were left out: {kinds}.")
    if nested:
        notes.append(
            f"{len(nested)} class folders hold folders (such as {nested[0]}): their images belong "
            "to the class."
        )
    return notes
