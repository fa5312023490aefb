"""All stages on a SLURM cluster: CPU nodes tile and evaluate, GPU nodes train and predict.

    pip install 'wsi_pipeline[cluster]'
    python workflows/slurm.py configs/lecture.yaml --cpu-jobs 20 --gpu-jobs 4

Run it on a login node (or in a job of its own) with the run directory and the slides on storage
that all nodes see. The scheduler lives in this process; dask-jobqueue submits the workers as SLURM
jobs, and a worker that SLURM kills is replaced, its unit done again. Stopping and starting the
script again does only what is not done yet.
"""

import argparse
import sys

from dask_jobqueue import SLURMCluster

from wsi_pipeline.command import alone_in, write_settings
from wsi_pipeline.config import Config
from wsi_pipeline.config_file import load_config
from wsi_pipeline.jobs.cluster import GPU_THREADS, connect
from wsi_pipeline.stages import evaluate, heatmap, tile, train

CPU_JOB = {"cores": 4, "processes": 4, "memory": "32GB", "walltime": "08:00:00"}
GPU_JOB = {"cores": 8, "processes": 1, "memory": "64GB", "walltime": "24:00:00"}


def main() -> int:
    """Submit workers, run the stages; 1 if any slide failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--cpu-jobs", type=int, default=10)
    parser.add_argument("--gpu-jobs", type=int, default=1)
    parser.add_argument("--queue")
    options = parser.parse_args()
    config = load_config(options.config)
    with alone_in(config.out):
        write_settings(config)
        failed = _on_nodes(config, CPU_JOB, options.cpu_jobs, options.queue, [tile])
        failed += _on_nodes(config, GPU_JOB, options.gpu_jobs, options.queue, [train, heatmap])
        failed += _on_nodes(config, CPU_JOB, options.cpu_jobs, options.queue, [evaluate])
    return int(failed > 0)


def _on_nodes(config: Config, job: dict, jobs: int, queue: str | None, stages: list) -> int:
    """Run stages on SLURM jobs of one kind; the number of units that failed."""
    gpu = job is GPU_JOB
    cluster = SLURMCluster(
        **job,
        queue=queue,
        job_extra_directives=["--gres=gpu:1"] if gpu else [],
        # Training starts loader processes, which Dask's workers may not by default.
        # Where there is a GPU reading takes all cores; Dask would leave it one.
        job_script_prologue=[
            "export DASK_DISTRIBUTED__WORKER__DAEMON=False",
            *([f"export OMP_NUM_THREADS={job['cores']}"] if gpu else []),
        ],
        worker_extra_args=(
            ["--nthreads", str(GPU_THREADS), "--resources", "GPU=1"] if gpu else ["--nthreads", "1"]
        ),
    )
    with cluster:
        cluster.scale(jobs=jobs)
        with connect(cluster.scheduler_address) as client:
            return sum(stage.run(config, client).failed for stage in stages)


if __name__ == "__main__":
    sys.exit(main())
