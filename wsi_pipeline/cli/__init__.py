"""The command line: one verb for each stage. A stage is imported only when its verb runs."""

from wsi_pipeline.cli import models, results, runs
from wsi_pipeline.cli.main import main

__all__ = ["main", "models", "results", "runs"]
