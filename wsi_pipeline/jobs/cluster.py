"""The Dask client of a run: worker processes on this machine, or a scheduler that is running.

A program that calls `connect` without a scheduler must do so under ``if __name__ == "__main__":``,
since worker processes import its main module again.
"""

import gc
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import dask
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, SpecCluster, WorkerPlugin
from distributed.system import MEMORY_LIMIT

from wsi_pipeline.errors import ConfigError

GPU = "GPU"
"""The resource of a worker that has a GPU to itself."""
GPU_THREADS = 2
"""Units that share a GPU when they predict: one reads while another computes."""
GPU_CORES = "WSI_GPU_CORES"
"""Of a local worker with a GPU, the environment's variable with its share of all cores."""

PACKAGE = "wsi_pipeline"

logger = logging.getLogger(__name__)


@contextmanager
def connect(
    scheduler: str | None = None, *, workers: int | None = None, timeout_s: float = 30.0
) -> Iterator[Client]:
    """Give the client of a running scheduler, or of worker processes started for the purpose.

    Parameters
    ----------
    scheduler : str, optional
        Address of a running scheduler, ``tcp://host:port``. This waits, as long as it takes, for
        its first worker. Its workers offer a GPU by ``--resources GPU=1``; with ``--nthreads 2``
        reading overlaps with computing there.
    workers : int, optional
        Processes on this machine; by default one for each CPU core, and as many as there are GPUs
        at least. Each of the first gets one of the visible GPUs (see `visible_gpus`), the resource
        ``GPU=1`` and `GPU_THREADS` threads, at every stage. The others have one thread and no GPU.
        For arithmetic and decoding each has the same share of the cores; `GPU_CORES` tells units
        that need a GPU how many they may decode with, since the workers without have nothing to do
        then.
    timeout_s : float
        How long a running scheduler may take to answer.

    Yields
    ------
    distributed.Client
        Closed at the end, together with the processes that were started.

    Raises
    ------
    ConfigError
        If no scheduler answers, or its workers lack this version of the package.
    """
    with _local(workers) if scheduler is None else _running(scheduler, timeout_s) as client:
        yield client


def scheduler_address(client: Client) -> str:
    """Where a client's scheduler is, or was."""
    return str(client.scheduler.address) if client.scheduler else "no address"


def worker_threads(client: Client, resources: dict[str, float] | None = None) -> int:
    """Threads of all workers that offer the resources."""
    return sum(worker["nthreads"] for worker in _workers(client, resources).values())


def worker_addresses(client: Client, resources: dict[str, float] | None = None) -> list[str]:
    """Addresses of all workers that offer the resources."""
    return list(_workers(client, resources))


def _workers(client: Client, resources: dict[str, float] | None) -> dict[str, dict]:
    """What the scheduler knows of the workers that offer the resources, by address."""
    return {
        address: worker
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()
        if all(worker["resources"].get(name, 0) >= n for name, n in (resources or {}).items())
    }


def has_resource(client: Client, name: str) -> bool:
    """Whether a worker offers the resource: ``has_resource(client, GPU)``."""
    return worker_threads(client, {name: 1}) > 0


def visible_gpus() -> list[str]:
    """GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them, and narrows them down.

    The driver's own tool is asked: this module is imported where there is no torch.
    """
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [str(i) for i, _ in enumerate(x for x in listing.splitlines() if x.startswith("GPU "))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


@contextmanager
def _local(workers: int | None) -> Iterator[Client]:
    gpus = visible_gpus()
    count = workers or max(CPU_COUNT, len(gpus))
    gpus = [*gpus[:count], *[""] * (count - len(gpus))]
    with_gpu = sum(map(bool, gpus))
    settings = {
        "distributed.worker.daemon": False,  # a training has children: its loader processes
        # Dask makes workers hand freed memory back at once; training would wait for new pages.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
        # Most units wait at the scheduler, not on a worker that may die; those that ask for a
        # resource do not, as Dask hands them out at once: `run_units` tells who killed a worker.
        "distributed.scheduler.worker-saturation": 1.0,
    }
    with (
        dask.config.set(settings),
        SpecCluster(
            workers={
                i: _worker(gpu, max(1, CPU_COUNT // count), max(1, CPU_COUNT // max(1, with_gpu)))
                for i, gpu in enumerate(gpus)
            },
            scheduler={
                "cls": Scheduler,
                "options": {
                    "host": "127.0.0.1",
                    "dashboard": False,
                    "dashboard_address": "127.0.0.1:0",  # where it still tells its health
                    "allowed_failures": 0,
                },
            },
            silence_logs=logging.CRITICAL,  # `run_units` tells of deaths
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


class _IgnoreInterrupt(WorkerPlugin):
    """Ctrl-C reaches every process of a terminal; the client alone shall answer it."""

    def setup(self, worker):
        """Called in the worker's main thread, where signals are set."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _worker(gpu: str, threads: int, gpu_cores: int) -> dict:
    """Specification of a worker process with this GPU, "" for none, and threads for arithmetic.

    Its memory limit is the machine's memory, not its share of it: units leave nothing in a
    worker's memory that Dask could spill, and a training may well take most of what there is.
    """
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    return {
        "cls": Nanny,
        "options": {
            "host": "127.0.0.1",
            "nthreads": GPU_THREADS if gpu else 1,
            "memory_limit": MEMORY_LIMIT,
            "env": environment | ({GPU_CORES: str(gpu_cores)} if gpu else {}),
            "resources": {GPU: 1} if gpu else None,
            "plugins": [_IgnoreInterrupt()],
            "silence_logs": logging.CRITICAL,
        },
    }


@contextmanager
def _running(address: str, timeout_s: float) -> Iterator[Client]:
    with _client_of(address, timeout_s) as client:
        if not worker_threads(client):
            logger.warning("no worker is connected to %s yet: waiting for the first", address)
            client.wait_for_workers(1)
        _check_versions(client)
        yield client


def _client_of(address: str, timeout_s: float) -> Client:
    try:
        return Client(address, timeout=timeout_s)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    gc.collect()  # the half-made client: collected while the next one starts, it would block it
    raise ConfigError(
        f"no Dask scheduler answers at {address!r}; it must be the address of a running one,"
        f" tcp://host:port ({reason})"
    )


def _check_versions(client: Client):
    expected = version(PACKAGE)
    for worker, found in client.run(version, PACKAGE, on_error="return").items():
        if found != expected:
            raise ConfigError(
                f"worker {worker} has {PACKAGE} {found if isinstance(found, str) else 'not'}"
                f" installed, this process {expected}: they must be the same"
            )
