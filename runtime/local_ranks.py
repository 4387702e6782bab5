"""The processes that a launcher (torchrun, srun, mpirun) started on this host, as its environment variables say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import UsageError

LOCAL_RANKS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI's mpirun
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
)
"""The variables with a process's number on its host and how many there are, the innermost launcher first: torchrun and
mpirun may themselves be started by srun."""


class LocalRank(NamedTuple):
    """This process's number on its host, how many processes the launcher started there, and the number's variable."""

    rank: int
    size: int
    variable: str


def local_rank(environ: Mapping[str, str]) -> LocalRank | None:
    """The process's place among those that a launcher started on this host; None without a launcher.

    Raises:
        UsageError: a launcher's variable is not a number.
    """
    for variable, size in LOCAL_RANKS:
        rank = number_of(environ, variable)
        if rank is not None and rank >= 0:  # some scripts set LOCAL_RANK=-1 where there is no launcher
            return LocalRank(rank, number_of(environ, size) or 1, variable)
    return None


def number_of(environ: Mapping[str, str], variable: str) -> int | None:
    """The number in an environment variable; of Slurm's ``8(x2),4``, tasks on each host, the first.

    Raises:
        UsageError: it is not a number.
    """
    text = environ.get(variable, "").strip()
    if not text:
        return None
    try:
        return int(text.partition("(")[0].partition(",")[0])
    except ValueError:
        raise UsageError(
            f"{variable}={text}: expected a number, as a launcher sets it; unset it or name the GPU with --device"
        ) from None


def share_of_cores(environ: Mapping[str, str], usable: int, installed: int) -> int | None:
    """How many cores this process may use so that the launcher's processes on this host share them.

    ``usable`` cores may run this process, of ``installed`` ones. None where there is nothing to share: no launcher, or
    one that bound each process to cores of its own.

    Raises:
        UsageError: a launcher's variable is not a number.
    """
    found = local_rank(environ)
    if found is None or usable < installed:
        return None
    return max(1, usable // found.size) if found.size > 1 else None
