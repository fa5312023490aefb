"""What a torch.export archive (.pt2) holds, looked at before torch loads it.

`torch.export.load` unpickles some parts of an archive, evaluates others as Python, and links
compiled ones: a file made for that runs code. All of that is refused here. What is left is a graph
of torch's own operators and plain tensors.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from wsi_pipeline.errors import ModelError

WEIGHTS, CONSTANTS, MODEL = "data/weights/", "data/constants/", "models/model.json"
EXAMPLES = "data/sample_inputs/model.pt"
KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|{re.escape(MODEL)}|{re.escape(EXAMPLES)}|extra/[\w./-]+"
)
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision)\.\w+(\.\w+)?|torch\.sym_\w+"
    r"|_operator\.\w+|math\.\w+"
)
SYMBOL = re.compile(r"'[A-Za-z]\w{0,20}'")
EXPRESSION = re.compile(r"[\w\s(),=+\-*/<>.]*")
EXPRESSION_WORDS = {
    *re.findall(
        r"\w+",
        """Symbol Integer Float Rational Add Mul Pow Mod PythonMod Max Min Abs FloorDiv CeilDiv
        CleanDiv ModularIndexing IntTrueDiv FloatTrueDiv TruncToInt TruncToFloat FloorToInt
        CeilToInt RoundToInt ToFloat Where Identity Eq Ne Le Lt Ge Gt And Or Not positive
        integer real True False oo int_oo
        """,
    )
}
NAME = re.compile(r"[\w.:+/-]*( [\w.:+/-]+)*")
STRUCTURE = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
"""Types of the containers of a graph's inputs and outputs."""


def check_pt2(path: Path) -> bytes:
    """Refuse an archive whose loading could run code that it brings.

    Returns
    -------
    bytes
        The example inputs, which torch would unpickle: the caller has to try that in safety.
        Empty where there are none.

    Raises
    ------
    ModelError
        If it is damaged, or holds a part that is none of those that are known to be safe.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            for folder in ("weights", "constants"):
                config = members.get(f"data/{folder}/model_{folder}_config.json")
                if config and _has_pickles(json.loads(archive.read(config))):
                    raise ModelError(_refusal(path, f"pickled {folder}"))
            if MODEL not in members:
                raise ModelError(f"{path} holds no network of torch.export.save")
            described = json.loads(archive.read(members[MODEL]))
            examples = archive.read(members[EXAMPLES]) if EXAMPLES in members else b""
    except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a torch.export archive: {error}") from error
    for wrong in _unsafe_texts(described, ""):
        raise ModelError(_refusal(path, f"{wrong[:60]!r} in its graph"))
    return examples


def _refusal(path: Path, what: str) -> str:
    return (
        f"{path} holds {what}, by which loading it could run code. Save the network again by"
        " torch.export.save from a recent torch, without objects of your own classes"
    )


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, str]:
    """The archive's names, without the folder that all are in, to their full names."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if len({name.casefold() for name in names}) < len(names):  # torch may read the other one
        raise ModelError(_refusal(path, "two parts of one name"))
    members = {name.partition("/")[2]: name for name in names}
    if len(members) < len(names):
        raise ModelError(_refusal(path, "two parts of one name"))
    for name in members:
        if not KNOWN.fullmatch(name):
            raise ModelError(_refusal(path, f"the part {name or members[name]}"))
    return members


def _has_pickles(config: dict) -> bool:
    return any(of["use_pickle"] is not False for of in config["config"].values())


def _unsafe_texts(value, key: str) -> Iterator[str]:
    """Texts of a graph's description that are not what torch writes under their key."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not NAME.fullmatch(name):
                yield name
            elif name not in ("metadata", "guards_code"):  # notes; conditions that are not used
                yield from _unsafe_texts(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _unsafe_texts(part, key)
    elif isinstance(value, str) and not _is_safe(value, key):
        yield value


def _is_safe(text: str, key: str) -> bool:
    if key == "target":
        return bool(OPERATOR.fullmatch(text))
    if key == "expr_str":
        plain = SYMBOL.sub("1", text)
        words = set(re.findall(r"[A-Za-z_]\w*", plain))
        known = {word for word in words if re.fullmatch(r"(s|u|z|zuf|zf)\d+", word)}
        return bool(EXPRESSION.fullmatch(plain)) and words <= EXPRESSION_WORDS | known
    if key in ("in_spec", "out_spec"):
        return not text or _is_plain_structure(json.loads(text)[1])
    return bool(NAME.fullmatch(text))


def _is_plain_structure(spec: dict) -> bool:
    return spec["type"] in STRUCTURE and all(map(_is_plain_structure, spec["children_spec"]))
