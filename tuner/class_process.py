"""Run :mod:`.class_layers` and the like in a separate process, which contains whatever a config makes transformers do.

That process has no network and limits on its memory and time. Transformers and its many imports stay out of the process
that tunes.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .projections import LeftOut, Model, ModelConfigError, Projection

START_SECONDS = 240
"""Time limit of the process. On a cold disk most of the time goes into importing PyTorch and transformers."""
BUILD_SECONDS = 40
"""Time limit for building a class after the imports; the largest published models take under two seconds."""
MEMORY_BYTES = 8 * 2**30
"""Memory limit of the process. PyTorch takes some hundred megabytes, parameters on the meta device none."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_UNUSED = ("torchao", "bitsandbytes", "deepspeed", "tensorflow", "jax", "flax", "sklearn", "datasets", "pandas")
"""Packages that transformers imports if they are installed, which takes seconds and changes no layer."""
_NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_REMOTE_CODE = "transformers_modules"
"""The package under which transformers imports code that came with a model."""


@functools.lru_cache(maxsize=64)
def layers_of_class(text: str, name: str, seconds: int = BUILD_SECONDS) -> Model:
    """List the layers of transformers' class for the JSON ``text`` of a config.

    Raises:
        ModelConfigError: as :func:`~.class_layers.list_layers`, or the class took too much time or memory.
    """
    return model_of(ask(__name__, {"name": name, "text": text}, seconds)["model"])


def ask(module: str, request: dict[str, Any], seconds: int) -> dict[str, Any]:
    """What ``main(seconds)`` of ``module`` answers to a request in a contained process: it calls :func:`serve`.

    Raises:
        ModelConfigError: it refused the request, or took too much time or memory.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main({seconds})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **_ENVIRONMENT},
            timeout=START_SECONDS + seconds,
            start_new_session=True,  # Ctrl-C on a terminal is for this process, which ends the other one
        )
    except subprocess.TimeoutExpired:
        raise ModelConfigError(
            f"reading it with transformers took over {START_SECONDS + seconds} s and was ended"
        ) from None
    if done.returncode == -signal.SIGALRM:
        raise ModelConfigError(
            f"building its class took over {seconds} s and was ended; its counts or sizes are larger than any model's"
        )
    if done.returncode or not done.stdout:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelConfigError(f"reading it with transformers failed: {said}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "refused" in answer:
        raise ModelConfigError(answer["refused"])
    return answer


def model_of(data: dict[str, Any]) -> Model:
    """The model that the other process sent as JSON, which has lists where the values have tuples."""
    projections = tuple(Projection(**{**row, "modules": tuple(row["modules"])}) for row in data["projections"])
    left_out = tuple(
        LeftOut(**{**row, "shape": tuple(row["shape"]), "modules": tuple(row["modules"])}) for row in data["left_out"]
    )
    return Model(data["name"], "", data["layers"], projections, tuple(data["notes"]), left_out, data["activation"])


def main(seconds: int) -> None:
    """Answer one request of :func:`layers_of_class`; runs in the separate process."""
    serve(_answer, seconds)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], seconds: int) -> None:
    """Contain this process, read one request from standard input, and answer it on standard output.

    ``answer`` has so many seconds once transformers is imported. What it refuses is told, too.
    """
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print must not mix with the answer
    gc.disable()  # a quarter of the time that the imports take: 2.7 s instead of 3.5
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    for package in _UNUSED:
        sys.modules[package] = None  # type: ignore[assignment]
    sys.addaudithook(_refuse)
    request = json.load(sys.stdin)
    from .meta_model import load_transformers

    load_transformers()
    signal.alarm(seconds)
    try:
        found = answer(request)
    except ModelConfigError as error:
        found = {"refused": str(error)}
    except MemoryError:
        found = {"refused": "building its class takes more memory than any model's; its counts or sizes are too large"}
    finally:
        signal.alarm(0)
    json.dump(found, answer_to)
    answer_to.flush()
    os._exit(0)  # skip the interpreter's shutdown, which takes long with PyTorch


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from .class_layers import list_layers

    return {"model": dataclasses.asdict(list_layers(json.loads(request["text"]), request["name"]))}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that blocks the network and a model's own code: reading a config needs neither."""
    if event in _NETWORK:
        raise OSError("the network is not used to read a config")
    if event == "import" and str(arguments[0]).partition(".")[0] == _REMOTE_CODE:
        raise ImportError("code that comes with a model is not executed")
