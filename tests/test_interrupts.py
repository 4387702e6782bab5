"""Ctrl-C ends every command with exit code 130 within seconds, whatever it is doing, and leaves no process behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = "import sys, time, doratune.cli\nfrom doratune.__main__ import main\n"
END = '\nsys.argv = ["doratune"]\ndoratune.cli.main = command\nmain()\n'
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

STARTED = 0.15
"""Seconds in which Python has begun to run the program: what ends before is ended by Python itself."""

COMMANDS = {
    "waits": "def command():\n    say()\n    time.sleep(60)",
    "swallows": """
def command():
    say()
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass""",
    "fails": """
def command():
    say()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise SystemExit(1)""",
    "fails in its own way": """
def command():
    try:
        say()
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("half a module")""",
    "waits in C for a lock": """
import sqlite3
def command():
    first = sqlite3.connect(PATH); first.execute("CREATE TABLE t (a)"); first.execute("BEGIN IMMEDIATE")
    say()
    sqlite3.connect(PATH, timeout=60, isolation_level=None).execute("BEGIN IMMEDIATE")""",
    "has children": """
import subprocess
CHILD = "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN);" \
    "child = subprocess.Popen(['sleep', '60'], start_new_session=True); print(child.pid, flush=True); time.sleep(60)"
def command():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True)
    say(child.pid, child.stdout.readline().strip())
    child.wait()""",
    "logs what it is interrupted by": """
import logging
def command():
    try:
        say()
        time.sleep(60)
    except BaseException:
        logging.getLogger("a library").error("while it was closing something", exc_info=True)
        raise""",
    "makes a store": """
from pathlib import Path
from doratune.cache import create
from doratune.cache.location import Location
def command():
    path = Path(PATH)
    with create.new_file(Location.parse(path), path) as fresh:
        fresh.with_name(fresh.name + "-journal").write_text("half")
        say()
        while True:  # as in a call that Python cannot leave
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass""",
    "leaves threads": """
import threading
def command():
    threading.Thread(target=time.sleep, args=(60,)).start()
    say()
    time.sleep(60)""",
}


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """A process group of its own, as a terminal has, that runs ``command`` in place of the command line's."""
    say = "def say(*what):\n    print('ready', *what, flush=True)\n"
    code = f"{START}PATH = {str(folder / 'locked.sqlite')!r}\n{say}{command}{END}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background has none
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_130(name: str, presses: int, tmp_path: Path) -> None:
    process = started(COMMANDS[name], tmp_path)
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    assert ready[:1] == ["ready"], process.stderr and process.stderr.read()
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    if presses == 2:
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < (2.0 if presses == 2 else 5.0) + 5.0  # for a busy machine
    assert (output, "Traceback" in errors) == ("", False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    deadline = time.monotonic() + 5
    while any(alive(int(pid)) for pid in ready[1:]):
        assert time.monotonic() < deadline, "children are left"
        time.sleep(0.02)


def test_the_command_line_itself_is_started_so(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "doratune", "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("doratune, version")
    scripts = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'doratune = "doratune.__main__:main"' in scripts


class Tuning:
    """A tuning run for as long as it takes, in a folder of its own, which prints one object at its end."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.triton = folder / "home", folder / "temporary", folder / "triton"
        self.temporary.mkdir(parents=True)
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}
        config = folder / "config.json"
        config.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "vocab_size": 64, **layers}))
        options = ["--gpu", "h200", "--evaluator", "predict", "--jobs", "1", "--trials", "50", "--json"]
        places = {"DORATUNE_HOME": self.home, "TMPDIR": self.temporary, "TRITON_CACHE_DIR": self.triton}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "doratune", "tune", "--config", str(config), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **{name: str(path) for name, path in places.items()}},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def interrupt(self, presses: int) -> str:
        """Press Ctrl-C so often; return the standard output, once nothing is left of the run."""
        began = time.monotonic()
        for _ in range(presses):
            os.killpg(self.process.pid, signal.SIGINT)
            time.sleep(0.05)
        output, errors = self.process.communicate(timeout=30)
        assert time.monotonic() - began < 5.0 + 5.0  # for a busy machine
        assert self.process.returncode == 130, errors
        assert "Traceback" not in errors, errors[-3000:]
        if output:
            assert json.loads(output)["stopped"] == "interrupt"
        assert [path for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")] == []
        assert list(self.home.glob(".*")) == []
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{self.process.pid}") or _with_environment(f"TMPDIR={self.temporary}"):
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.05)
        return output


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_a_tuning_run_leaves_neither_a_process_nor_a_file_nor_half_an_object(presses: int, tmp_path: Path) -> None:
    run = Tuning(tmp_path)
    assert run.process.stderr is not None
    while "kernels" not in run.process.stderr.readline():  # the search begins
        assert run.process.poll() is None
    deadline = time.monotonic() + 60
    while not any(run.triton.glob("*")) and time.monotonic() < deadline:  # a worker compiles
        time.sleep(0.02)
    output = run.interrupt(presses)
    assert output or presses == 2


BLOCKED = """
import multiprocessing, signal
from concurrent.futures import ProcessPoolExecutor
from doratune.codegen.compile_process import starting
with starting():  # the first worker of a process: its queues start multiprocessing's resource tracker
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    first = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
with starting():
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    second = other.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
print(*(signal.SIGINT in blocked.result() for blocked in (first, second)))
print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
pool.shutdown(), other.shutdown()
"""


def test_a_worker_that_starts_gets_no_ctrl_c_the_first_one_neither() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


IN_A_CALLBACK = """
import os, signal, time, weakref
from doratune.terminal import interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with SIGINT ignored
interrupts.watch()
class Thing: pass
def ends(reference):
    {what}
thing = Thing()
reference = weakref.ref(thing, ends)
del thing
time.sleep(60)
"""


def test_a_ctrl_c_that_python_cannot_raise_ends_the_process_without_a_traceback() -> None:
    code = IN_A_CALLBACK.format(what="os.kill(os.getpid(), signal.SIGINT); time.sleep(1)")
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_other_errors_that_python_cannot_raise_are_printed() -> None:
    code = IN_A_CALLBACK.format(what="1 / 0").replace("time.sleep(60)", "")
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.slow
def test_a_tuning_run_is_interrupted_at_any_moment(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """``--interrupts 100 --timeout 0`` does so a hundred times, once or twice each, from Python's start on."""
    count = int(request.config.getoption("--interrupts"))
    if not count:
        pytest.skip("a campaign of minutes: --interrupts N")
    chance = random.Random(0)
    for number in range(count):
        run = Tuning(tmp_path / str(number))
        time.sleep(STARTED + chance.uniform(0.0, 8.0))
        run.interrupt(chance.choice((1, 2)))


def _with_environment(setting: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if setting.encode() in (folder / "environ").read_bytes().split(b"\0") and alive(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
