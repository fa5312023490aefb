"""The command line: the group of verbs, what they share, and how the user's errors are shown."""

import logging
import re
from pathlib import Path

import click
from rich.logging import RichHandler

from wsi_pipeline import __version__
from wsi_pipeline.command import WRONG, console
from wsi_pipeline.config import Config
from wsi_pipeline.config_file import load_config
from wsi_pipeline.errors import WsiError


class Verbs(click.Group):
    """Shows the user's errors without a traceback and leaves with status 2."""

    def invoke(self, ctx):
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except (WsiError, OSError) as error:  # OSError: the disk is full, the network gone
            message = f"{type(error).__name__}: {error}"
        console.print(message, style="red", markup=False, soft_wrap=True)
        return ctx.exit(WRONG)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsi")
def main():
    """Whole-slide pathology: from slides and annotations to heatmaps and a FROC report."""
    own = logging.getLogger("wsi_pipeline")
    own.addHandler(RichHandler(console=console, show_path=False, show_level=False, show_time=False))
    own.setLevel(logging.INFO)


scheduler_option = click.option(
    "--scheduler", metavar="tcp://HOST:PORT", help="A running Dask scheduler; else this machine."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="The run directory."
)
config_option = click.option(
    "-c",
    "--config",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="Settings: a YAML file, see `wsi init`.",
)


folder_type = click.Path(path_type=Path, exists=True, file_okay=False)
file_type = click.Path(path_type=Path, exists=True, dir_okay=False)
results_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the results; made when missing.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")


class Size(click.ParamType):
    """Width and height in pixels, as 4096x4096."""

    name = "WxH"

    def convert(self, value, param, ctx):
        """Two positive numbers."""
        if isinstance(value, tuple):
            return value
        if not (found := re.fullmatch(r"(\d+)x(\d+)", value)):
            self.fail(f"{value!r} is no size: write it as 4096x4096", param, ctx)
        return int(found[1]), int(found[2])


class Point(click.ParamType):
    """A pixel, as 1024,-64."""

    name = "X,Y"

    def convert(self, value, param, ctx):
        """Two whole numbers."""
        if isinstance(value, tuple):
            return value
        if not (found := re.fullmatch(r"(-?\d+),(-?\d+)", value)):
            self.fail(f"{value!r} is no place: write it as 1024,2048", param, ctx)
        return int(found[1]), int(found[2])


def load_settings(path: Path, out: Path | None, scheduler: str | None, **overrides) -> Config:
    """Read the settings file, with what the command line gives in its place."""
    if out is not None:
        overrides["out"] = out
    if scheduler is not None:
        overrides["jobs"] = {"scheduler": scheduler}
    return load_config(path, **overrides)
