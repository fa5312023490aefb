"""All stages on this computer, one worker process for each core.

    python workflows/laptop.py configs/camelyon16.yaml

The same as `wsi run -c configs/camelyon16.yaml`, spelled out: a place to start from when a stage
is to be left out, repeated, or put between steps of your own.
"""

import sys

from wsi_pipeline.command import alone_in, write_settings
from wsi_pipeline.config_file import load_config
from wsi_pipeline.jobs.cluster import connect
from wsi_pipeline.stages import evaluate, heatmap, tile, train


def main(path: str) -> int:
    """Run the stages; 1 if any slide failed."""
    config = load_config(path)
    with (
        alone_in(config.out),
        connect(config.jobs.scheduler, workers=config.jobs.workers) as client,
    ):
        write_settings(config)
        outcomes = [stage.run(config, client) for stage in (tile, train, heatmap, evaluate)]
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":  # Dask starts its workers by importing this file again
    sys.exit(main(*sys.argv[1:]))
