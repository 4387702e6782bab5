"""Which GPU a process takes that a launcher (torchrun, srun, mpirun) started with others."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UsageError
from ..runtime.local_ranks import local_rank, number_of
from .study_storage import storage_file

_HOSTS = ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES")


def launcher_device(environ: Mapping[str, str], visible: int) -> str | None:
    """The device for this process, such as ``cuda:3``, where a launcher started it; else None.

    ``visible`` is how many GPUs the process sees. A launcher that gives each process a GPU of its own, as
    ``srun --gpus-per-task=1`` does, lets it see only that one, which is then ``cuda:0`` whatever the process's number.

    Raises:
        UsageError: there are more processes than GPUs, or a launcher's variable is not a number.
    """
    found = local_rank(environ)
    if found is None or visible < 1:
        return None
    rank, _, variable = found
    if visible == 1:
        return "cuda:0"
    if rank >= visible:
        raise UsageError(
            f"{variable}={rank}: this process sees {visible} GPUs, numbered from 0, and needs one to itself; "
            "start no more processes than GPUs on a host, or name the GPU with --device"
        )
    return f"cuda:{rank}"


def check_hosts(environ: Mapping[str, str], study_storage: str) -> None:
    """Refuse a study storage in a file where the launcher started processes on several hosts.

    Raises:
        UsageError: on a folder that the hosts share, they would damage the file, since SQLite's locks work on one
            host; in a folder of its own, each host would tune every kernel.
    """
    hosts = launcher_hosts(environ)
    if hosts > 1 and storage_file(study_storage) is not None:
        raise UsageError(
            f"the launcher started processes on {hosts} hosts, and the study storage {study_storage} is a SQLite file, "
            "which serves one host; name a database with --study-storage postgresql://… and --store postgresql://…"
        )


def was_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process."""
    return local_rank(environ) is not None


def launcher_hosts(environ: Mapping[str, str]) -> int:
    """On how many hosts the launcher started processes, as far as it says so; else 1."""
    return max([1, *(number_of(environ, variable) or 1 for variable in _HOSTS)])
