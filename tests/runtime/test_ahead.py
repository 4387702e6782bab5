"""Kernels are compiled in parallel by a process of its own, and whatever happens to it costs only time.

The compiles are real, for an H100: Triton needs no GPU for them.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import doratune
from doratune.cache.entry import Binary
from doratune.codegen import compile_server
from doratune.codegen.compile import contiguous_alignments
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import declared_kernels
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_configs
from doratune.errors import UsageError
from doratune.runtime import ahead
from doratune.runtime.ahead import Batch, Compiled, Needs, compile_ahead, needs_of
from doratune.runtime.binaries import Binaries
from doratune.runtime.kernel import Kernel, Request

GPU = find_gpu("h100-sxm")
PACKAGE = Path(doratune.__file__).parent


BINARY = Binary("", "lora_compose_kernel", "", "", "{}", b"")


class Compiling(Kernel):
    """A kernel that only notes for which alignments it is loaded."""

    def __init__(self, spec: KernelSpec, binaries: Binaries | None = None) -> None:
        source = render(spec, default_configs(spec, GPU)[0])
        super().__init__(spec, torch.device("cuda", 0), None, source, binaries)
        self.loaded: list[tuple[int, ...]] = []

    def bind(self, alignments: tuple[int, ...]) -> Any:
        self.loaded.append(alignments)
        self._launchers[alignments] = lambda *operands: None


def request(d_out: int = 64, op: str = "lora_compose", tokens: int = 16, binaries: Binaries | None = None) -> Request:
    sizes = {"d_out": d_out, "d_in": 64, "rank": 8, "tokens": tokens}
    spec = KernelSpec.create(op, **sizes, dtype="bf16", adapter="bf16", magnitude=None, gpu=GPU.slug)
    return Compiling(spec, binaries), tuple(contiguous_alignments(spec).values())


def loaded(requests: list[Request]) -> list[int]:
    return [len(kernel.loaded) for kernel, _ in requests]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "launchers_of", lambda code, descriptors: [])  # as from Triton 3.7 on


def test_what_is_compiled_is_in_tritons_cache_for_the_loader(tmp_path: Path) -> None:
    requests = [request(64), request(128), request(64, "compose_backward")]
    wanted = sum(len(declared_kernels(kernel._source)) for kernel, _ in requests)
    assert sum(len(needs_of(*each).tasks) for each in requests) == wanted == 4
    done = compile_ahead(requests)
    assert (done.kernels, done.failed) == (wanted, 0)
    assert loaded(requests) == [1, 1, 1]
    assert len([*(tmp_path / "cache").rglob("*.cubin")]) == wanted
    again = [request(64), request(128), request(64, "compose_backward")]
    assert not any(needs_of(*each).tasks for each in again)
    assert compile_ahead(again) == Compiled(0, 0)
    assert loaded(again) == [1, 1, 1]


def test_equal_code_is_compiled_once() -> None:
    requests = [request(64, tokens=16), request(64, tokens=32), request(128)]
    assert requests[0][0]._source.code_digest == requests[1][0]._source.code_digest
    assert compile_ahead(requests).kernels == 2
    assert loaded(requests) == [1, 1, 1]


def test_operands_that_are_not_aligned_get_code_of_their_own() -> None:
    kernel, aligned = request(64)
    odd = (2, *aligned[1:])
    assert compile_ahead([(kernel, aligned), (kernel, odd)]).kernels == 2
    assert kernel.loaded == [aligned, odd] or kernel.loaded == [odd, aligned]  # type: ignore[attr-defined]


def test_a_stored_binary_is_not_compiled() -> None:
    stored = Binaries({"lora_compose_kernel": BINARY})
    kernel, aligned = request(64, binaries=stored)
    assert needs_of(kernel, aligned) == Needs([], [])
    assert needs_of(kernel, (2, *aligned[1:])).tasks, "it is for contiguous operands"


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(ahead.subprocess, "Popen", starts)


@pytest.mark.usefixtures("no_server")
def test_no_process_starts_for_stored_binaries() -> None:
    assert compile_ahead([]) == Compiled(0, 0)
    stored = Binaries({"lora_compose_kernel": BINARY})
    requests = [request(64, binaries=stored), request(128, binaries=stored)]
    assert compile_ahead(requests) == Compiled(0, 0)
    assert loaded(requests) == [1, 1]


def test_one_kernel_alone_is_compiled_where_it_is_launched() -> None:
    alone = request(64)
    compile_ahead([alone])
    assert needs_of(*alone).tasks
    assert loaded([alone]) == [0]


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    ("variable", "value"), [(ahead.PROCESSES, "0"), ("TRITON_ALWAYS_COMPILE", "1"), ("TRITON_KERNEL_DUMP", "1")]
)
def test_it_can_be_switched_off_and_is_where_it_would_not_help(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert compile_ahead([request(64), request(128)]).kernels == 0


@pytest.mark.usefixtures("no_server")
def test_a_frozen_application_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert compile_ahead([request(64), request(128)]).kernels == 0


def test_a_wrong_number_of_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ahead.PROCESSES, "many")
    with pytest.raises(UsageError, match="DORATUNE_COMPILE_PROCESSES=many: expected a number of processes"):
        compile_ahead([request(64), request(128)])


# What can go wrong with the server.


def replaced(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``code`` in the server before it serves."""
    popen = subprocess.Popen

    def start(command: list[str], **named: Any) -> Any:
        return popen([*command[:2], f"import os, sys, time, signal\n{code}\n{command[2]}"], **named)

    monkeypatch.setattr(ahead.subprocess, "Popen", start)


PATCHED = """
from doratune.codegen import compile_server
compiles = compile_server._compile
def patched(task):
    if "128" in task.spec:
        {}
    compiles(task)
compile_server._compile = patched
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("raise ImportError('no such module')", "exit code 1: ImportError: no such module"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
def test_a_server_that_ends_is_told_once_and_costs_only_time(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(code, monkeypatch)
    requests = [request(64), request(128)]
    with pytest.warns(RuntimeWarning, match=f"one after another, because .* failed: .*{said}"):
        done = compile_ahead(requests)
    assert (done.kernels, done.failed) == (0, 2)
    assert loaded(requests) == [0, 0]


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced("time.sleep(600)", monkeypatch)
    monkeypatch.setattr(ahead, "SILENT_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.warns(RuntimeWarning, match="no kernel was finished within 1 s"):
        assert compile_ahead([request(64), request(128)]).failed == 2
    assert time.monotonic() - begin < 20.0


def test_python_that_cannot_be_started_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_executable", lambda: "/no/such/python")
    with pytest.warns(RuntimeWarning, match="No such file or directory: '/no/such/python'"):
        assert compile_ahead([request(64), request(128)]).failed == 2


def test_a_crash_of_the_compiler_costs_only_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(PATCHED.format("os.abort()"), monkeypatch)
    monkeypatch.setenv(ahead.PROCESSES, "2")
    requests = [request(64), request(96), request(128), request(64, "compose_backward")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = compile_ahead(requests)
    assert done.kernels + done.failed == 5
    assert done.failed >= 1
    assert loaded(requests)[2] == 0


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "killed"
    once = f"os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os.kill(os.getpid(), signal.SIGKILL))"
    replaced(PATCHED.format(once), monkeypatch)
    requests = [request(64), request(96), request(128)]
    done = compile_ahead(requests)
    assert mark.exists()
    assert (done.kernels, done.failed) == (3, 0)
    assert loaded(requests) == [1, 1, 1]


def test_a_text_that_does_not_compile_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    kernel, aligned = request(64)
    broken = kernel._source.text.replace("tl.load(", "tl.no_such_load(")
    object.__setattr__(kernel._source, "text", broken)
    good = [request(96), request(128)]
    with caplog.at_level(logging.INFO, logger="doratune"):
        done = compile_ahead([(kernel, aligned), *good])
    assert (done.kernels, done.failed) == (2, 1)
    assert loaded([(kernel, aligned), *good]) == [0, 1, 1]
    assert any("was not compiled ahead: CompilationError" in record.message for record in caplog.records)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))  # root may write anywhere else
    requests = [request(64), request(128)]
    assert compile_ahead(requests).failed == 2
    assert loaded(requests) == [0, 0]


def test_a_load_that_fails_is_left_to_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Kernel, alignments: tuple[int, ...]) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Compiling, "bind", fails)
    assert compile_ahead([request(64), request(128)]).failed == 0


def servers_started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of the compile servers that are started from now on."""
    pids: list[int] = []
    popen = subprocess.Popen

    def start(command: Any, **named: Any) -> Any:
        process = popen(command, **named)
        if "compile_server" in command[-1]:
            pids.append(process.pid)
        return process

    monkeypatch.setattr(ahead.subprocess, "Popen", start)
    return pids


def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = servers_started(monkeypatch)
    replaced_by = iter([KeyboardInterrupt])
    monkeypatch.setattr(Compiling, "bind", lambda *_: (_ for _ in ()).throw(next(replaced_by)))
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C while the others compile
        compile_ahead([request(64), request(96), request(128), request(64, "compose_backward")])
    [pid] = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    deadline = time.monotonic() + 20.0
    while workers_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(pid)


def test_a_batch_that_nobody_finishes_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = servers_started(monkeypatch)
    Batch([request(64), request(128)])
    gc.collect()
    [pid] = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def workers_of(server: int) -> list[int]:
    """The processes that run the server's code with ``server`` in their group of children, also orphaned ones."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line, parent = status.read_bytes(), (status.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if b"compile_server import main" in line and int(parent) in (server, 1):
            found.append(int(status.parent.name))
    return found


# C launchers, which Triton up to 3.6 compiles before a kernel's first start.


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of launchers that were compiled; each kernel has one, and one that depends on descriptors."""
    made: list[str] = []

    def compiled(text: str) -> None:
        if "None" in text:
            raise RuntimeError("Failed to find C compiler")
        made.append(text)

    monkeypatch.setattr(
        ahead, "launchers_of", lambda code, descriptors: [f"{len(code.signature)} parameters", f"{descriptors}"]
    )
    monkeypatch.setattr(ahead, "launcher_is_compiled", lambda text: text in made)
    monkeypatch.setattr(ahead, "compile_launcher", compiled)
    return made


def test_c_launchers_are_compiled_beside_kernels_each_once(
    launchers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    requests = [request(64), request(128)]
    with caplog.at_level(logging.INFO, logger="doratune"):
        assert compile_ahead(requests) == Compiled(2, 0)
    assert len(launchers) == 1, "kernels of one signature share their launcher"
    assert loaded(requests) == [1, 1], "a launcher that fails is left to the first start"
    assert "a C launcher was not compiled ahead: RuntimeError('Failed to find C compiler')" in caplog.text


@pytest.mark.usefixtures("no_server")
def test_a_stored_binary_is_loaded_when_its_launchers_are_there(launchers: list[str]) -> None:
    stored = replace(BINARY, metadata=json.dumps({"tensordesc_meta": [1, 2]}))
    kernel, aligned = request(64, binaries=Binaries({"lora_compose_kernel": stored}))
    batch = Batch([(kernel, aligned)])
    assert loaded([(kernel, aligned)]) == [0]
    assert batch.finish() == Compiled(0, 0)
    assert len(launchers) == 2
    assert "[1, 2]" in launchers
    assert loaded([(kernel, aligned)]) == [1]


# What a user sees.


def test_a_long_compile_is_told_in_the_log_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead, "TOLD_AFTER_SECONDS", 0.0)
    monkeypatch.setenv(ahead.PROCESSES, "2")
    with caplog.at_level(logging.INFO, logger="doratune"):
        compile_ahead([request(64), request(128)])
    first, last = [record.message for record in caplog.records]
    assert first == "compiling 2 kernels for this model (2 processes)"
    assert last.startswith("compiled 2 kernels in ")
    assert capfd.readouterr() == ("", "")


def test_a_long_compile_is_told_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead, "TOLD_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    compile_ahead([request(64), request(128)])
    out, err = capsys.readouterr()
    assert out == ""
    assert "doratune: compiling 2 kernels for this model (" in err


def test_a_short_one_is_not_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "TOLD_AFTER_SECONDS", 600.0)
    with caplog.at_level(logging.INFO, logger="doratune"):
        compile_ahead([request(64), request(128)])
    assert not caplog.records


SCRIPT = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
print("imported")
sys.path.insert(0, {tests!r})
from doratune.runtime import ahead
from doratune.runtime.ahead import compile_ahead
ahead.launchers_of = lambda code, descriptors: []
import importlib.util
spec = importlib.util.spec_from_file_location("test_ahead", {this!r})
module = importlib.util.module_from_spec(spec)
sys.modules["test_ahead"] = module
spec.loader.exec_module(module)
print(compile_ahead([module.request(64), module.request(128)])[:2])
"""


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    """A spawned or forkserver worker would run the script again."""
    (tmp_path / "random.py").write_text("raise SystemExit('the folder of the script hides a module of Python')")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT.format(tests=str(PACKAGE), this=str(Path(__file__))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "imported\n(2, 0)\n", done.stderr


def test_a_daemonic_process_can_compile(tmp_path: Path) -> None:
    """``multiprocessing`` forbids its daemons to have children, as those of a data loader or of Ray."""
    script = tmp_path / "train.py"
    script.write_text(
        "import multiprocessing\n"
        "def work():\n"
        + "".join(f"    {line}\n" for line in SCRIPT.format(tests=str(PACKAGE), this=str(Path(__file__))).splitlines())
        + "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work, daemon=True)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n(2, 0)\n", done.stderr


# Several processes of a launcher.


def test_a_launchers_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doratune.codegen.compile_process.usable_cores", lambda: 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert ahead._processes() == 16
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ahead._processes() == 2
    monkeypatch.setenv("LOCAL_RANK", "who knows")
    assert ahead._processes() == 16


def test_a_launchers_processes_compile_each_kernel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers with the same tasks: a kernel that one compiles is waited for by the other."""
    requests = [request(size) for size in (64, 96, 128, 160)]
    tasks = [task for each in requests for task in needs_of(*each).tasks]
    log = tmp_path / "log"
    patch = f"""
import triton
def note(*, src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        with open({str(log)!r}, "a") as file:
            file.write(metadata["hash"] + chr(10))
triton.knobs.compilation.listener = note
"""
    locks = tmp_path / "locks"
    locks.mkdir()
    servers = []
    for rank in range(2):
        order = [*tasks[2 * rank :], *tasks[: 2 * rank]]
        asked = tmp_path / f"{rank}.json"
        asked.write_text(json.dumps({"processes": 1, "locks": str(locks), "tasks": order}))
        (tmp_path / f"{rank}.txt").write_text(f"{asked}\n")
        code = f"import os\n{patch}\nfrom doratune.codegen.compile_server import main; main()"
        servers.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=(tmp_path / f"{rank}.txt").open(),
                stdout=subprocess.PIPE,
                env=ahead._environment(),
                text=True,
            )
        )
    for server in servers:
        out, _ = server.communicate(timeout=120)
        assert sorted(json.loads(line) for line in out.splitlines()) == [[index, None] for index in range(4)]
    assert not [*locks.iterdir()], "no lock is left"
    compiled = log.read_text().split()
    assert len(compiled) == len({*compiled}) == 4


@pytest.mark.slow
def test_a_task_that_another_process_compiles_is_left_to_it(tmp_path: Path) -> None:
    import fcntl

    [task] = needs_of(*request(64)).tasks
    with (tmp_path / task.digest).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert compile_server.compile_task(task, str(tmp_path), False) == compile_server._BUSY
    assert compiled_elsewhere(task, tmp_path) == "None"
    assert not needs_of(*request(64)).tasks, "it is compiled"
    assert compiled_elsewhere(task, tmp_path / "no such folder") == "None"


def compiled_elsewhere(task: compile_server.Task, locks: Path) -> str:
    """What ``compile_task`` returns in a process that never had Triton's interpreter on."""
    code = (
        "import json, sys\nfrom doratune.codegen.compile_server import Task, compile_task\n"
        "print(compile_task(Task(*json.load(sys.stdin)), sys.argv[1], False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(locks)],
        input=json.dumps(task),
        env=ahead._environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.strip() or done.stderr


def test_ctrl_c_does_not_end_the_server_before_its_parent(tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"processes": 1, "locks": None, "tasks": needs_of(*request(64)).tasks}))
    with subprocess.Popen(
        [sys.executable, "-c", "from doratune.codegen.compile_server import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ahead._environment(),
        text=True,
    ) as server:
        time.sleep(2.0)  # it waits for its tasks
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(f"{asked}\n", timeout=120)
    assert out == "[0, null]\n"
    assert not asked.exists()


def test_a_server_without_tasks_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from doratune.codegen.compile_server import main; main()"],
        stdin=subprocess.DEVNULL,
        env=ahead._environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_batch_leaves_out_what_another_one_compiles() -> None:
    first = Batch([request(64), request(128)])
    both = [request(64), request(96), request(160)]
    second = Batch(both, besides=first)
    assert first.finish().kernels == 2
    assert second.finish().kernels == 2
    assert loaded(both) == [1, 1, 1], "equal code of another kernel is loaded for this one too"
