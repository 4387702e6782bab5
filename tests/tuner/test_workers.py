"""Compiles run in other processes: equal code is compiled once, and a crash or a kill stays contained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import pytest

from doratune.codegen.compile import CompileError, OverLimitError
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import default_config
from doratune.tuner.evaluation import BrokenEnvironmentError
from doratune.tuner.workers import Compiled, CompilePool, CompilerCrashError, WorkerLostError

GPU = find_gpu("rtx4090")
FORWARD = Config.create("tile", block_t=1, block_n=256, num_warps=1, num_stages=2)


def forward(tokens: int, config: Config = FORWARD, d_out: int = 512) -> Source:
    return render(KernelSpec.create("compose_forward", d_out=d_out, tokens=tokens, dtype="bf16", gpu=GPU.slug), config)


def settle(pool: CompilePool, *futures: Future[Compiled], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(future.done() for future in futures):
        assert time.monotonic() < deadline
        pool.wait([future for future in futures if not future.done()])


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    opened = CompilePool(GPU, jobs=1)
    yield opened
    opened.close()


def test_a_worker_compiles_although_the_parent_interprets(pool: CompilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    job = pool.submit(forward(16))
    assert os.environ["TRITON_INTERPRET"] == "1"
    settle(pool, job)
    (kernel,) = job.result()
    assert (kernel.name, kernel.num_warps, kernel.spills) == ("compose_forward_kernel", 1, 0)
    assert 0 < kernel.registers <= 255


def test_token_buckets_of_one_shape_share_a_compile_and_other_shapes_do_not(pool: CompilePool) -> None:
    assert pool.submit(forward(16)) is pool.submit(forward(4096))
    assert pool.submit(forward(16)) is not pool.submit(forward(16, d_out=256))


def test_a_worker_gives_the_binary_of_every_kernel_in_the_text(pool: CompilePool) -> None:
    spec = KernelSpec.create("compose_backward", d_out=512, tokens=64, dtype="bf16", gpu=GPU.slug)
    source = render(spec, default_config(spec, GPU))
    binaries = pool.binaries(source).result(120)
    assert [binary.kernel for binary in binaries] == ["compose_backward_kernel", "add_chunks_kernel"]
    for binary in binaries:
        assert binary.image.startswith(b"\x7fELF")
        assert json.loads(binary.metadata)["name"] == binary.kernel
        assert (binary.code_digest, binary.architecture) == (source.code_digest, "sm_89")
        assert binary.triton == version("triton")


def test_a_kernel_beyond_the_gpu_is_a_typed_failure(pool: CompilePool) -> None:
    spec = KernelSpec.create(
        "lora_compose", d_out=512, rank=256, tokens=512, dtype="bf16", adapter="bf16", gpu=GPU.slug
    )
    config = Config.create("tile", block_t=128, block_n=128, block_k=64, num_warps=8, num_stages=5)
    job = pool.submit(render(spec, config))
    settle(pool, job)
    with pytest.raises(OverLimitError, match="bytes of shared memory"):
        job.result()


DEATHS = {
    2: (signal.SIGSEGV, CompilerCrashError, r"the compiler crashed \(SIGSEGV\)"),
    4: (signal.SIGPROF, CompilerCrashError, "s of processor time"),
    8: (signal.SIGKILL, WorkerLostError, r"was killed \(SIGKILL\).*memory.*--jobs"),
    16: (signal.SIGTERM, WorkerLostError, "was ended by SIGTERM"),
    32: (signal.SIGALRM, WorkerLostError, "did not end in .* the machine is busy"),
}
"""How the worker dies of a kernel with this many warps, and what is said of that kernel."""


@pytest.mark.slow
def test_a_worker_that_dies_says_of_its_candidate_what_its_end_shows_and_the_others_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    real = triton.knobs.nvidia.ptxas.path
    assembler = tmp_path / "ptxas"
    # The number of threads marks the kernels that this assembler and the process that called it do not survive.
    kills = "".join(
        f'  grep -qs -- "reqntid {32 * warps}$" "$f" && kill -{int(number)} $PPID && sleep 2\n'
        for warps, (number, _, _) in DEATHS.items()
    )
    assembler.write_text(f'#!/bin/sh\nfor f in "$@"; do\n{kills}done\nexec {real} "$@"\n')
    assembler.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    pool = CompilePool(GPU, jobs=1)
    fine = pool.submit(forward(16))
    settle(pool, fine)
    dying = {warps: Config.create("tile", block_t=2, block_n=512, num_warps=warps, num_stages=2) for warps in DEATHS}
    jobs = {warps: pool.submit(forward(16, config)) for warps, config in dying.items()}
    settle(pool, *jobs.values())
    late = pool.submit(forward(16, d_out=1024))
    settle(pool, late)
    pool.close()
    for warps, (_, error, said) in DEATHS.items():
        with pytest.raises(error, match=said) as caught:
            jobs[warps].result()
        assert str(dying[warps]) in str(caught.value)
        assert isinstance(caught.value, CompileError) == (error is CompilerCrashError), (
            "only a verdict is a CompileError"
        )
    assert fine.result()[0].registers > 0
    assert late.result()[0].registers > 0


@pytest.mark.slow
def test_a_crash_where_nothing_has_compiled_yet_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\n[ $# = 1 ] && exec echo 'release 12.8, V12.8.93'\nkill -SEGV $PPID && sleep 2\n")
    assembler.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    pool = CompilePool(GPU, jobs=1)
    job = pool.submit(forward(16))
    settle(pool, job)
    pool.close()
    with pytest.raises(WorkerLostError, match="has compiled nothing else so far"):
        job.result()


def test_workers_have_a_group_of_their_own_and_print_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    pool = CompilePool(GPU, jobs=1)
    pool.start()
    assert pool._pool is not None
    pid = pool._pool.submit(os.getpid).result(60)
    assert os.getpgid(pid) == pid
    temporary = Path(str(pool._temporary))
    assert temporary.is_dir()
    pool._pool.submit(print, "a compiler's message", flush=True).result(60)
    waiting = pool._pool.submit(os.system, "sleep 60")
    deadline = time.monotonic() + 30
    while not children(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    below = children(pid)
    began = time.monotonic()
    pool.kill()
    pool.close()
    assert time.monotonic() - began < 10
    assert waiting.exception() is not None
    assert below
    deadline = time.monotonic() + 10  # a killed process is gone once its parent, or init, has heard of it
    while any(alive(process) for process in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(process) for process in below), "its tools go with it"
    assert not temporary.exists()
    output, errors = capfd.readouterr()
    assert output == ""
    assert "a compiler's message" in errors


def test_a_worker_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doratune.tuner.workers.prepare_worker", sys.exit)  # any function that ends the process
    pool = CompilePool(GPU, jobs=1)
    job = pool.submit(forward(16))
    settle(pool, job)
    pool.close()
    with pytest.raises(BrokenEnvironmentError, match=r"compile workers do not start.*a new Python process"):
        job.result()


def test_a_pool_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(jobs: int, temporary: str) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("doratune.tuner.workers._workers", refuse)
    pool = CompilePool(GPU, jobs=1)
    job = pool.submit(forward(16))
    with pytest.raises(BrokenEnvironmentError, match=r"cannot be started.*Permission denied.*/dev/shm.*--jobs"):
        job.result(0)
    assert pool.submit(forward(16)) is not job, "only what a compile says of its text is remembered"


PARENT = """
import time
from doratune.tuner.workers import CompilePool
from tests_forward import GPU, source
if __name__ == "__main__":
    pool = CompilePool(GPU, jobs=2)
    jobs = [pool.submit(source(d_out)) for d_out in (256, 512)]
    pool.wait(jobs, 0.0)
    print("started", flush=True)
    time.sleep(60)
"""

SOURCE = """
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec
GPU = find_gpu("rtx4090")
def source(d_out):
    spec = KernelSpec.create("compose_forward", d_out=d_out, tokens=16, dtype="bf16", gpu="rtx4090")
    return render(spec, Config.parse("tile:block_n=256,block_t=1,num_warps=1,num_stages=2"))
"""


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "tests_forward.py").write_text(SOURCE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    deadline = time.monotonic() + 30
    while len(children(parent.pid)) < 3:  # two workers and multiprocessing's resource tracker
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)  # the workers are up, or about to find their parent gone
    started = children(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 15
    while any(alive(pid) for pid in started):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.05)
