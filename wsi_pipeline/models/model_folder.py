"""What a path holds that should be a model: a folder with a card, or some other program's file.

It is found without torch, and nothing of a file is run.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Literal

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import CARD_FILE

FileKind = Literal["safetensors", "pt2", "onnx", "torchscript", "pickle", "other"]
PICKLE_START = b"\x80"
"""Of pickles since protocol 2; the protocol follows."""
ONNX_SUFFIX = ".onnx"
IMPORTED = "`wsi model import FILE FOLDER` makes a model folder of it"
UNSAFE = {
    "pickle": "is a pickle. Loading a pickle can run code of whoever made it, so models are not"
    " loaded from one. Where you trust it: load it in Python, save its state dict as .safetensors,"
    " and give that to `wsi model import`",
    "torchscript": "is a TorchScript file. It can hold pickled objects and code, so models are not"
    " loaded from one. Export the network by torch.export.save (.pt2) or torch.onnx.export"
    " (.onnx), and give that to `wsi model import`",
}


def find_model(path: str | Path) -> Path:
    """The model folder that a path names.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    ModelError
        If there is no such path, it is a file, or a folder without a card. The message says what
        the path holds and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(
            f"{path} does not exist. A model is a folder with {CARD_FILE} and its weights"
        )
    if path.is_dir():
        return _checked_folder(path)
    if path.name == CARD_FILE:
        raise ModelError(f"{path} is a model's card. Give its folder, {path.parent}")
    kind = file_kind(path)
    refuse_unsafe(path, kind)
    if kind == "other":
        raise ModelError(f"{path} is a file. A model is a folder with {CARD_FILE} and its weights")
    if (path.parent / CARD_FILE).is_file():
        raise ModelError(f"{path} is the weights of a model. Give its folder, {path.parent}")
    raise ModelError(f"{path} is a file of the format {kind} without a card. {IMPORTED}")


def _checked_folder(folder: Path) -> Path:
    if (folder / CARD_FILE).is_file():
        return folder
    models = sorted(card.parent for card in folder.glob(f"models/*/{CARD_FILE}"))
    if models:
        raise ModelError(
            f"{folder} is a run directory, not a model folder. Give one of its models:"
            f" {', '.join(map(str, models[:3]))}"
        )
    raise ModelError(
        f"{folder} is not a model folder: it has no {CARD_FILE}. `wsi train` writes a model to"
        " RUN/models/NAME; `wsi model import` makes one of a file"
    )


def refuse_unsafe(path: Path, kind: FileKind) -> None:
    """Raise ModelError for files whose loading can run code."""
    if kind in UNSAFE:
        raise ModelError(f"{path} {UNSAFE[kind]}")


def file_kind(path: str | Path) -> FileKind:
    """What a file of weights is, by its content; ONNX, which nothing marks, also by its name.

    Raises
    ------
    ModelError
        If it cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":
            return "safetensors"
        if zipfile.is_zipfile(path):
            return _kind_of_zip(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if start[:1] == PICKLE_START and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if path.suffix.lower() == ONNX_SUFFIX:
        return "onnx"
    return "pickle" if _is_old_pickle(path) else "other"


def _kind_of_zip(path: Path) -> FileKind:
    """Which of the kinds of zip file that torch writes it is, by its members."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return "torchscript"
    if any(name.startswith("models/") for name in inner) or "serialized_exported_program.json" in (
        inner
    ):
        return "pt2"
    return "pickle" if "data.pkl" in inner else "other"


def _is_old_pickle(path: Path) -> bool:
    """Whether a file is a pickle of protocol 0 or 1, which nothing marks."""
    with path.open("rb") as file:
        try:
            for number, _ in enumerate(pickletools.genops(file)):
                if number > 1000:
                    break
        except Exception:  # whatever bytes that are no pickle end in
            return False
    return True
