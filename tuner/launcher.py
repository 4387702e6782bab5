"""Which GPU and how many cores a process takes that a launcher (torchrun, srun, mpirun) started with others."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UsageError

_LOCAL_RANKS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI's mpirun
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
)
"""The variables with a process's number on its host and how many there are, the innermost launcher first: torchrun and
mpirun may themselves be started by srun."""


_HOSTS = ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES")


def launcher_device(environ: Mapping[str, str], visible: int) -> str | None:
    """The device for this process, such as ``cuda:3``, where a launcher started it; else None.

    ``visible`` is how many GPUs the process sees. A launcher that gives each process a GPU of its own, as
    ``srun --gpus-per-task=1`` does, lets it see only that one, which is then ``cuda:0`` whatever the process's number.

    Raises:
        UsageError: there are more processes than GPUs, or a launcher's variable is not a number.
    """
    found = _local_rank(environ)
    if found is None or visible < 1:
        return None
    rank, variable = found
    if visible == 1:
        return "cuda:0"
    if rank >= visible:
        raise UsageError(
            f"{variable}={rank}: this process sees {visible} GPUs, numbered from 0, and needs one to itself; "
            "start no more processes than GPUs on a host, or name the GPU with --device"
        )
    return f"cuda:{rank}"


def launcher_jobs(environ: Mapping[str, str], usable: int, installed: int) -> int | None:
    """How many compile workers this process may have so that the launcher's processes on this host share its cores.

    ``usable`` cores may run this process, of ``installed`` ones. None where there is nothing to share: no launcher, or
    one that bound each process to cores of its own.
    """
    found = _local_rank(environ)
    if found is None or usable < installed:
        return None
    size = _number(environ, dict(_LOCAL_RANKS)[found[1]]) or 1
    return max(1, usable // size) if size > 1 else None


def check_hosts(environ: Mapping[str, str], study_storage: str) -> None:
    """Refuse a study storage in a file where the launcher started processes on several hosts.

    Raises:
        UsageError: on a folder that the hosts share, they would damage the file, since SQLite's locks work on one
            host; in a folder of its own, each host would tune every kernel.
    """
    hosts = launcher_hosts(environ)
    if hosts > 1 and ("://" not in study_storage or study_storage.startswith("sqlite")):
        raise UsageError(
            f"the launcher started processes on {hosts} hosts, and the study storage {study_storage} is a SQLite file, "
            "which serves one host; name a database with --study-storage postgresql://… and --store postgresql://…"
        )


def was_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process."""
    return _local_rank(environ) is not None


def launcher_hosts(environ: Mapping[str, str]) -> int:
    """On how many hosts the launcher started processes, as far as it says so; else 1."""
    return max([1, *(_number(environ, variable) or 1 for variable in _HOSTS)])


def _local_rank(environ: Mapping[str, str]) -> tuple[int, str] | None:
    """The process's number on its host, and the variable that says so."""
    for variable, _ in _LOCAL_RANKS:
        rank = _number(environ, variable)
        if rank is not None and rank >= 0:  # some scripts set LOCAL_RANK=-1 where there is no launcher
            return rank, variable
    return None


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    """The number in an environment variable; of Slurm's ``8(x2),4``, tasks on each host, the first."""
    text = environ.get(variable, "").strip()
    if not text:
        return None
    try:
        return int(text.partition("(")[0].partition(",")[0])
    except ValueError:
        raise UsageError(
            f"{variable}={text}: expected a number, as a launcher sets it; unset it or name the GPU with --device"
        ) from None
