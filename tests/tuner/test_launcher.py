"""Under torchrun, srun and mpirun each process takes the GPU of its number on the host, and its share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from doratune.errors import UsageError
from doratune.runtime.local_ranks import share_of_cores
from doratune.tuner.launcher import check_hosts, launcher_device, launcher_hosts

TORCHRUN = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "11",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
MPICH = {"PMI_RANK": "11", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
LAUNCHERS = pytest.mark.parametrize(
    "environ", [TORCHRUN, SRUN, OPEN_MPI, MPICH], ids=["torchrun", "srun", "Open MPI", "MPICH"]
)


@LAUNCHERS
def test_the_number_on_the_host_is_the_gpu(environ: dict[str, str]) -> None:
    assert launcher_device(environ, visible=8) == "cuda:3"


@LAUNCHERS
def test_a_process_that_sees_one_gpu_takes_it(environ: dict[str, str]) -> None:
    assert launcher_device(environ, visible=1) == "cuda:0"  # srun --gpus-per-task=1


@LAUNCHERS
def test_more_processes_than_gpus_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"=3: this process sees 2 GPUs, numbered from 0.*--device"):
        launcher_device(environ, visible=2)


def test_without_a_launcher_or_a_gpu_nothing_is_chosen() -> None:
    assert launcher_device({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, visible=8) is None
    assert launcher_device({"LOCAL_RANK": "-1"}, visible=8) is None
    assert launcher_device({"LOCAL_RANK": ""}, visible=8) is None
    assert launcher_device(TORCHRUN, visible=0) is None


def test_the_launcher_that_started_the_process_itself_counts() -> None:
    torchrun_in_srun = {**SRUN, "SLURM_LOCALID": "0", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    assert launcher_device(torchrun_in_srun, visible=8) == "cuda:5"
    assert launcher_device({**SRUN, **OPEN_MPI, "SLURM_LOCALID": "0"}, visible=8) == "cuda:3"


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_a_variable_that_is_no_number_is_an_error(variable: str) -> None:
    with pytest.raises(UsageError, match=rf"{variable}=first: expected a number.*--device"):
        launcher_device({variable: "first"}, visible=8)


@LAUNCHERS
def test_the_processes_of_a_host_share_its_cores(environ: dict[str, str]) -> None:
    assert share_of_cores(environ, usable=64, installed=64) == 8
    assert share_of_cores(environ, usable=8, installed=64) is None  # bound to them by the launcher
    assert share_of_cores(environ, usable=4, installed=4) == 1


def test_without_a_launcher_all_usable_cores_are_used() -> None:
    assert share_of_cores({}, usable=64, installed=64) is None
    assert share_of_cores({"SLURM_LOCALID": "0"}, usable=64, installed=64) is None  # no count given


def test_the_number_of_hosts_is_known() -> None:
    assert launcher_hosts({**TORCHRUN, "GROUP_WORLD_SIZE": "2"}) == 2
    assert launcher_hosts({**SRUN, "SLURM_STEP_NUM_NODES": "4"}) == 4
    assert launcher_hosts({}) == 1


@pytest.mark.parametrize("location", ["/home/ada/studies.sqlite", "sqlite:////home/ada/studies.sqlite"])
def test_a_file_is_refused_on_several_hosts(location: str) -> None:
    with pytest.raises(UsageError, match=r"4 hosts.*studies.sqlite is a SQLite file.*--study-storage postgresql://"):
        check_hosts({**SRUN, "SLURM_STEP_NUM_NODES": "4"}, location)
    check_hosts({**SRUN, "SLURM_STEP_NUM_NODES": "4"}, "postgresql://ada@db/kernels")
    check_hosts({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, location)


REPORT = """
import os
from doratune.runtime.local_ranks import share_of_cores
from doratune.tuner.launcher import launcher_device, launcher_hosts
environ = os.environ
os.write(1, f"{launcher_device(environ, 2)} {share_of_cores(environ, 8, 8)} {launcher_hosts(environ)}\\n".encode())
"""


def test_a_real_torchrun_gives_each_process_its_gpu_and_half_of_the_cores() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "cuda:0 4 1", "cuda:1 4 1"]
