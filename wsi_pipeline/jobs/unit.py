"""A unit of work: a frozen dataclass that says each input once and knows what it depends on.

The type of a field says how it enters the unit's hash:

- `LargeFile` (a slide, a finished store): by size and time of change; nothing is read.
- `SmallFile` (an annotation, a patch index): by content, so that a copy is the same file.
- `Output` (what the unit writes): not at all.
- ``Unhashed[...]``: not at all. It says how the work is done, or follows from other fields.
- settings (a pydantic model): by their values, but for those declared with
  ``json_schema_extra={"changes_result": False}``.
- other dataclasses: by their fields. All else must be a plain JSON value.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_type_hints

from pydantic import BaseModel

T = TypeVar("T")
NOT_HASHED = "not hashed"
Unhashed = Annotated[T, NOT_HASHED]
"""The type of a field that does not count: ``slab: Unhashed[Slab]``."""


class Output(str):
    """Path of a file or folder that a unit writes."""

    __slots__ = ()


@dataclass(frozen=True)
class File:
    """A file that a unit reads, and the state it was in when the unit was made.

    Parameters
    ----------
    path : str
        It does not count: a file that was moved is the same file.
    state : str
        ``"unreadable"`` where there is no such file: who opens it will say why, as a failure.
    """

    path: Unhashed[str]
    state: str


class LargeFile(File):
    """A file or folder that is known by its size and time of change."""

    @classmethod
    def at(cls, path) -> "LargeFile":
        """Look at a file."""
        return cls(str(path), file_fingerprint(path))


class SmallFile(File):
    """A file that is known by its content."""

    @classmethod
    def at(cls, path) -> "SmallFile":
        """Read a file."""
        return cls(str(path), file_fingerprint(path, content=True))


@dataclass(frozen=True)
class Unit(ABC):
    """A piece of work that is done or not done: the smallest thing that a restart repeats.

    A stage's units are frozen dataclasses derived from this one, picklable and small: paths and
    numbers, never pixels or open files. `run` works on a Dask worker.

    Parameters
    ----------
    slide_id : str
        The slide that it belongs to; empty where it is of all slides.
    """

    slide_id: str

    @property
    def key(self) -> str:
        """Its name, unique in its stage."""
        return self.slide_id

    @property
    def outputs(self) -> tuple[Path, ...]:
        """What must exist for the unit to be done: each `Output` among its fields."""
        values = (getattr(self, of.name) for of in fields(self))
        return tuple(Path(value) for value in values if isinstance(value, Output))

    @abstractmethod
    def run(self) -> dict:
        """Do the work.

        Returns
        -------
        dict
            Small, of plain JSON values. Under ``failures`` it may list reasons (str) why part of
            the work is missing.

        The output is written to a temporary place and renamed, so that a kill leaves no half of a
        file.
        """

    def hash(self, schema_version) -> str:
        """Hash of all that the result depends on, and of the version of the code that makes it."""
        return hash_inputs({"schema_version": schema_version, "inputs": state_of(self)})


def state_of(value):
    """What a value counts for in a hash, as plain JSON values; see the module's description.

    Raises
    ------
    TypeError
        If it, or a part of it, is of a type that is none of these: its text might not be stable.
    """
    if is_dataclass(value):
        return {name: state_of(part) for name, part in _counting_fields(value)}
    if isinstance(value, BaseModel):
        settings = type(value).model_fields.items()
        return {name: state_of(getattr(value, name)) for name, of in settings if _counts(of)}
    if isinstance(value, Mapping):
        return {str(name): state_of(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [state_of(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be an input of a unit")


def _counting_fields(value) -> Iterator[tuple[str, object]]:
    """The fields of a dataclass that are hashed; TypeError if a file is given as another type."""
    for name, (types, hashed) in _field_types(value.__class__).items():
        part = getattr(value, name)
        declared = types & {LargeFile, SmallFile, Output}
        if declared and part is not None and type(part) not in declared:
            raise TypeError(
                f"{type(value).__name__}.{name} is {part!r}, not a {declared.pop().__name__}"
            )
        if hashed and Output not in types:
            yield name, part


@cache
def _field_types(of: type) -> dict[str, tuple[set[type], bool]]:
    """The types that each field may have (without their parameters), and whether it is hashed."""
    hints = get_type_hints(of, include_extras=True)
    found = {}
    for name in (field.name for field in fields(of)):
        hint = hints[name]
        marks = getattr(hint, "__metadata__", ())
        plain = get_args(hint)[0] if marks else hint
        found[name] = set(get_args(plain) or (plain,)), NOT_HASHED not in marks
    return found


def _counts(setting) -> bool:
    return (setting.json_schema_extra or {}).get("changes_result", True)


def hash_inputs(inputs: dict) -> str:
    """SHA-256, in hexadecimal, of plain JSON values; the order of keys does not matter.

    Raises
    ------
    TypeError
        If a value is none of JSON's (a numpy number): its text might not be stable.
    """
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(path, content: bool = False) -> str:
    """What tells a file from a changed one.

    Parameters
    ----------
    path : path-like
    content : bool
        Hash the content; else take size and time of change.

    Returns
    -------
    str
        ``"unreadable"`` where there is no such file.
    """
    try:
        if content:
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        stat = Path(path).stat()
    except OSError:
        return "unreadable"
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
