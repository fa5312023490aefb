"""A script for QuPath that shows an OME-TIFF heatmap over the open slide."""

from importlib.resources import files
from pathlib import Path

from wsi_pipeline.files import write_whole

SCRIPT = "qupath_overlay.groovy"


def write_qupath_script(folder) -> Path:
    """Copy the script into a folder, usually that of the OME-TIFFs, whole or not at all.

    Parameters
    ----------
    folder : path-like
        An existing folder.

    Returns
    -------
    Path
        The script, ``qupath_overlay.groovy``: the same for all slides.
    """
    path = Path(folder) / SCRIPT
    write_whole(path, (files("wsi_pipeline.export") / SCRIPT).read_bytes())
    return path
