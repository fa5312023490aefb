"""All stages on one machine with GPUs: many readers tile, one worker for each GPU predicts.

    python workflows/gpu_box.py configs/lecture.yaml

`connect` gives the first workers a GPU each and the resource `GPU=1`; training and heatmaps go
there, tiling and evaluation to all. With several GPUs training runs on all of them (torchrun,
DistributedDataParallel) unless `train.processes` says otherwise.
"""

import sys

from wsi_pipeline.command import alone_in, write_settings
from wsi_pipeline.config_file import load_config
from wsi_pipeline.jobs.cluster import GPU, connect, has_resource
from wsi_pipeline.stages import evaluate, heatmap, tile, train


def main(path: str) -> int:
    """Run the stages; 1 if any slide failed."""
    config = load_config(path)
    with alone_in(config.out), connect(workers=config.jobs.workers) as client:
        write_settings(config)
        if not has_resource(client, GPU):
            sys.exit("no GPU was found on this machine: use workflows/laptop.py")
        outcomes = [stage.run(config, client) for stage in (tile, train, heatmap, evaluate)]
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":  # Dask starts its workers by importing this file again
    sys.exit(main(*sys.argv[1:]))
