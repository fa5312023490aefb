"""Builds the sdist and the wheel and uses the wheel as a stranger would, outside the checkout.

Run it with the Python of the development environment, which has `build` and all requirements. The
wheel goes into an empty environment. That environment borrows the requirements (PyTorch takes
several GB) from the development environment, and nothing else.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

SETTINGS = """\
out: run
catalog:
  csv: cohort/slides.csv
  split: {train: 0.4, validation: 0.3, test: 0.3}
tile: {level: null, mpp: 2.0, patch_px: 32, stride_px: 32, inner_px: 32}
train:
  weights: none
  epoch_examples: 32
  validation_examples: 32
  max_epochs: 1
  batch_size: 16
  precision: float32
heatmap: {chunk: 4, precision: float32}
evaluate: {replicates: 20}
jobs: {workers: 2}
"""


def copy_of_checkout(folder: Path) -> Path:
    """The files that git tracks, without an earlier build's list of files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((CHECKOUT / name).read_bytes())
    return folder


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, source],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_files(source: Path, sdist: Path, wheel: Path) -> None:
    """Every module, template and configuration is in both."""
    files = [path for path in (source / "wsi_pipeline").rglob("*") if path.is_file()]
    files += [path for path in (source / "configs").iterdir() if path.is_file()]
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    missing = []
    for path in files:
        name = path.relative_to(source).as_posix()
        installed = f"wsi_pipeline/{name}" if name.startswith("configs/") else name
        missing += [f"{sdist.name}: {name}"] * (name not in in_sdist)
        missing += [f"{wheel.name}: {installed}"] * (installed not in in_wheel)
    if missing:
        sys.exit("Files are missing:\n" + "\n".join(missing))


def install(wheel: Path, folder: Path) -> Path:
    """The `bin` folder of a new environment with the wheel in it."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    names = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=names))
    # A path in a .pth file comes after the environment's own packages. .pth files that lie there,
    # such as that of an editable installation, are not read.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def use(bin_folder: Path, work: Path, version: str) -> None:
    """The command line, up to a small run through all stages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=work, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    place = run(bin_folder / "python", "-c", "import wsi_pipeline; print(wsi_pipeline.__file__)")
    assert Path(place.strip()).is_relative_to(bin_folder.parent), f"imported from {place}"
    wsi = bin_folder / "wsi"
    assert run(wsi, "--version").split()[-1] == version
    assert "heatmap" in run(wsi, "--help")
    assert "catalog:" in run(wsi, "init")
    (work / "settings.yaml").write_text(SETTINGS)
    run(wsi, "phantom", "cohort", "--slides", "6", "--size", "2048x2048", "--seed", "5")
    run(wsi, "run", "-c", "settings.yaml")
    assert (work / "run/evaluation/vgg16/report.html").is_file()


def main() -> None:
    """Build, check, install, use."""
    with tempfile.TemporaryDirectory(prefix="wsi_package_") as name:
        folder = Path(name).resolve()
        source = copy_of_checkout(folder / "source")
        sdist, wheel = build(source, folder / "dist")
        check_files(source, sdist, wheel)
        work = folder / "work"
        work.mkdir()
        use(install(wheel, folder / "installed"), work, version=wheel.name.split("-")[1])
        print(f"{sdist.name} and {wheel.name}: built, complete, installed and used")


if __name__ == "__main__":
    main()
