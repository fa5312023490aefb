"""The import order of docs/architecture.md, read from there, held against the package's code."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wsi_pipeline"
WITHOUT_TORCH = (
    "errors", "files", "geometry", "raster", "config", "config_file", "command", "cli", "slides",
    "patches", "heatmaps", "evaluation", "report", "export", "jobs",
    "phantom",
)  # fmt: skip


def documented_rows():
    """Rows of the order, the uppermost first: sets of rooms between which nothing is imported."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^Import order:.*?```\n(.*?)```", text, re.DOTALL | re.MULTILINE).group(1)
    return [
        [{room.strip() for room in group.split(",")} for group in line.split("|")]
        for line in block.splitlines()
    ]


def places():
    """Row and group of each room: two rooms of one group may import each other."""
    return {
        room: (row, group)
        for row, groups in enumerate(documented_rows())
        for group, rooms in enumerate(groups)
        for room in rooms
    }


def room_of(module: str) -> str:
    """``wsi_pipeline.slides.reader`` is in the room ``slides``."""
    return module.split(".")[1]


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, package: str):
    """Modules of this package that the source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*above, *filter(None, [node.module])]) if node.level else node.module
            names = [base]
            if base == "wsi_pipeline":
                names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("wsi_pipeline."))


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a room may import from another: itself, its group, or a row below."""
    if imported.startswith("__"):  # of the package itself, such as __version__
        return True
    where = places()
    return where[imported][0] > where[importer][0] or where[imported] == where[importer]


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_the_rows_are_read_from_the_document():
    where = places()
    assert where["errors"] == where["geometry"] == (7, 0)
    assert [where[room] for room in ("stages", "config", "jobs", "patches")] == [
        (1, 0), (4, 0), (4, 1), (5, 1),
    ]  # fmt: skip


def test_every_room_of_the_package_has_its_row():
    assert {room_of(module_name(path)) for path in modules()} == set(places()) - {"workflows"}


def test_every_package_is_installed():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    folders = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
    listed = settings["options"]["packages"].split()
    assert sorted(listed) == sorted({*folders, "wsi_pipeline.configs"})


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_module_imports_only_from_rows_below_its_own(path):
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    importer = room_of(module)
    wrong = [
        imported
        for imported in imported_modules(path.read_text(), package)
        if not is_allowed(importer, room_of(imported))
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["heatmaps", "explain"])
def test_heatmaps_and_explanations_know_no_model(room):
    for path in (PACKAGE / room).glob("*.py"):
        rooms = {room_of(name) for name in imported_modules(path.read_text(), "wsi_pipeline.x")}
        assert "models" not in rooms


def test_imports_are_found_in_every_form():
    source = """
import os, wsi_pipeline.slides.reader
from wsi_pipeline.patches.index import read_index
from wsi_pipeline import geometry, __version__
def late():
    from . import tile
    from ..jobs import run
"""
    assert [room_of(name) for name in imported_modules(source, "wsi_pipeline.stages")] == [
        "slides", "patches", "geometry", "__version__", "stages", "jobs",
    ]  # fmt: skip


def test_neighbours_and_rows_above_are_refused():
    assert is_allowed("geometry", "errors")
    assert is_allowed("jobs", "jobs")
    assert is_allowed("stages", "slides")
    assert not is_allowed("jobs", "config")
    assert not is_allowed("slides", "patches")


def test_the_light_modules_import_without_torch():
    light = [
        name
        for name in (module_name(path) for path in modules())
        if any(name == f"wsi_pipeline.{x}" or name.startswith(f"wsi_pipeline.{x}.")
               for x in WITHOUT_TORCH)
    ]  # fmt: skip
    assert len(light) >= len(WITHOUT_TORCH)
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", program, *light], check=True, cwd=ROOT)
