"""Property: whatever is in a config, reading it opens no connection, executes no code that lies beside it or that it
names, ends in time, and leaves transformers out of the process that asked.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from doratune.tuner import class_process, projections
from doratune.tuner.class_process import layers_of_class
from doratune.tuner.models import read_config
from doratune.tuner.projections import ModelConfigError, Projection

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A server that stands for the hub of models, and for any proxy on the way; the connections it has seen."""
    seen: list[Any] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            seen.append(address)
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, url)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield seen
    server.close()


@pytest.mark.slow
def test_no_connection_is_opened_even_where_transformers_would_download(
    hub: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    asks = "from transformers import AutoConfig; AutoConfig.from_pretrained('someone/model')"
    subprocess.run([sys.executable, "-c", asks], capture_output=True, timeout=120, env=dict(os.environ))
    assert hub, "the server sees what transformers downloads"
    hub.clear()
    tempting = {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone": "someone/model",
        "use_pretrained_backbone": True,
    }
    with pytest.raises(ModelConfigError, match="names another model, whose config would have to be downloaded"):
        layers_of_class(json.dumps(tempting), "tempting")
    # Offline or not, the process has no network.
    monkeypatch.setattr(class_process, "_ENVIRONMENT", {**class_process._ENVIRONMENT, "HF_HUB_OFFLINE": "0"})
    monkeypatch.setitem(class_process._ENVIRONMENT, "TRANSFORMERS_OFFLINE", "0")
    with pytest.raises(ModelConfigError):
        layers_of_class(json.dumps({**tempting, "backbone": "someone/other"}), "tempting")
    assert hub == []


@pytest.mark.slow
def test_code_that_comes_with_a_model_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "executed"
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"open({str(marker)!r}, 'w').close()\n"
    for module in ("configuration_evil", "modeling_evil", "transformers", "torch", "json"):
        (folder / f"{module}.py").write_text(code)
    remote = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**TINY, "auto_map": remote}))
    monkeypatch.chdir(folder)  # nothing is imported from where the user stands, either
    assert read_config(folder).projections[0].name == "q_proj"
    (folder / "config.json").write_text(json.dumps({**TINY, "architectures": ["EvilForCausalLM"], "auto_map": remote}))
    with pytest.raises(ModelConfigError, match="executes none of it"):
        read_config(folder)
    assert not marker.exists()


def test_a_model_comes_back_whole_and_transformers_stays_out_of_the_process_that_asks() -> None:
    code = (
        "import sys\nfrom doratune.tuner.class_process import layers_of_class\n"
        f"print(layers_of_class({json.dumps(TINY)!r}, 'tiny'))\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    printed, modules = done.stdout.splitlines()
    assert modules == "set()"
    model = eval(printed, vars(projections))
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert model.projections[0] == Projection("q_proj", 64, 64, False, 2, names)
    assert (model.name, model.layers, len(model.projections)) == ("tiny", 2, 7)
    assert [(left.name, left.shape, left.modules) for left in model.left_out] == [("lm_head", (128, 64), ("lm_head",))]


@pytest.mark.slow
def test_a_class_that_takes_too_long_is_ended() -> None:
    endless = {"model_type": "swin", "depths": [10_000] * 100, "num_heads": [1] * 100}
    with pytest.raises(ModelConfigError, match="building its class took over 2 s and was ended; its counts or sizes"):
        layers_of_class(json.dumps(endless), "endless", 2)


def test_a_process_that_dies_is_an_error_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ModelConfigError, match="reading it with transformers failed: exit code 1"):
        layers_of_class(json.dumps({**TINY, "vocab_size": 7}), "dead")
