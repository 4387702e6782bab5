"""Text and bytes from a store, a config or a file are data: nothing executes or unpickles them.

The package calls what could do so only in the places below, each with its reason; and a store whose every text is
Python, with a config and a spec that try to break out of the emitted text, has none of it compiled or run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import doratune
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import check_config

ROOT = Path(doratune.__file__).parent
NOT_THE_PACKAGE = {"tests", "docs", "build", "dist", "examples", ".mypy", ".venv"}

BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"),
    *("runpy", "code", "codeop", "imp", "pty", "yaml", "ctypes", "cffi"),
}
METHODS = {
    *("find_class", "exec_module", "load_module", "spec_from_file_location", "spec_from_loader", "run_path"),
    *("run_module", "load_inline", "cpp_extension", "unsafe_load", "full_load", "read_pickle", "system", "popen"),
    *("PickleType", "from_string", "load_extension", "enable_load_extension", "load_state_dict_from_url"),
}
SWITCHES = ("shell", "trust_remote_code", "allow_pickle")
LOADS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("jit", "load"), ("package", "PackageImporter")}

ALLOWED = {
    ("codegen/module.py", "exec"): "runs the text that the installed templates rendered",
    ("codegen/module.py", "compile"): "the same",
    ("codegen/compile_process.py", "ctypes"): "asks the kernel to end a child with its parent",
    ("internals/cuda.py", "ctypes"): "calls the GPU driver's own library, which Triton loads too",
    ("tuner/isolation.py", "pickle"): "sends an evaluator through a pipe to a process of its own",
    ("benchmarks/dorafactors.py", "spec_from_file_location"): "a peer's code, from a folder that the user names",
    ("benchmarks/dorafactors.py", "exec_module"): "the same",
}
"""Every place that names one of the above, with the reason why nothing from outside reaches it."""


def named(tree: ast.AST) -> Iterator[str]:
    """What a file names of the lists above."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.func.id
        elif isinstance(node, ast.Import):
            yield from (name for each in node.names if (name := each.name.split(".")[0]) in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = (node.module or "").split(".")[0]
            yield from {module} & MODULES
            yield from ({each.name for each in node.names} & {*METHODS, *BUILTINS})
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if node.attr in METHODS or (node.attr in ("eval", "exec") and owner == "builtins"):
                yield node.attr
            elif (owner, node.attr) in LOADS:
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in SWITCHES and ast.unparse(node.value) != "False":
            yield node.arg


@pytest.fixture(scope="module")
def files() -> dict[str, ast.Module]:
    """The parsed files of the package."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_THE_PACKAGE]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_what_executes_or_unpickles_is_named_in_the_known_places_alone(files: dict[str, ast.Module]) -> None:
    assert {(path, name) for path, tree in files.items() for name in named(tree)} == ALLOWED.keys()


def test_an_emitted_text_is_made_by_the_renderer_alone(files: dict[str, ast.Module]) -> None:
    """What is executed is a ``Source``. A compile server makes those that the process which started it sends."""
    makers = {
        path
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Source"
    }
    assert makers == {"codegen/render.py", "codegen/compile_server.py"}


SPEC = KernelSpec.create("compose_forward", d_out=96, tokens=16, dtype="bf16", gpu="h200")
BREAK_OUT = ('"""\nimport os\n"""', "{{ cycler.__init__.__globals__ }}", "{% import os %}", "a\nb", "\\", "'")


@pytest.mark.parametrize("text", BREAK_OUT, ids=repr)
def test_no_spec_or_config_breaks_out_of_the_text_that_it_is_written_into(text: str) -> None:
    with pytest.raises(SpecError):
        KernelSpec.parse(f"{SPEC}{text}")
    with pytest.raises(SpecError):
        KernelSpec.parse(str(SPEC).replace("96", text))
    for values in ({text: 1}, {"block_n": text}):
        config = {"variant": "tile", "num_warps": 4, "num_stages": 2, **values}
        assert _refused(config), config
    assert _refused({"variant": text, "num_warps": 4, "num_stages": 2})


def _refused(config: dict[str, object]) -> bool:
    """Whether a config is refused by its own class, by the check that comes before rendering, or by the renderer."""
    try:
        made = Config.from_dict(config)
        if check_config(SPEC, made, find_gpu("h200")) is not None:
            return True
        render(SPEC, made)
    except (SpecError, TypeError):
        return True
    return False


HOSTILE = """
import os, sys
from importlib.metadata import version
from pathlib import Path

from doratune.cache.entry import MEASURED, Binary, Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.cli import main
from doratune.codegen.digest import code_digest
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import load_module
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_configs
from doratune.runtime.loader import resolve_binaries
import doratune.tuner.report, triton.language

store, home, spec, created = sys.argv[1:]
os.environ["DORATUNE_HOME"] = home
spec = KernelSpec.parse(spec)
config = default_configs(spec, find_gpu(spec.gpu))[0]
honest = render(spec, config)
evil = f"EVIL = open({created!r}, 'w')"
text = chr(34) * 3 + evil + chr(34) * 3 + chr(10) + evil + chr(10)
with Store.open(store, create=True) as opened:
    environment = Environment("h200", "sm_90", evil, evil, evil, evil, evil)
    evaluation, digest = Evaluation(MEASURED, us=20.0, floor_us=16.0), template_digest(spec.op, config.variant)
    opened.put(Entry(spec, config, digest, honest.digest, text, evaluation, environment, "2026-11-23T10:00:00+00:00"))
    for digest in (honest.code_digest, code_digest(text)):
        metadata = '{"name": "compose_forward_kernel", "doratune": {}, "EVIL": "EVIL"}'
        opened.put_binary(Binary(digest, "compose_forward_kernel", version("triton"), "sm_90", metadata, evil.encode()))

seen = []

def watch(event, arguments):
    if event in ("compile", "exec"):
        text = arguments[0]
        seen.append(str(text if isinstance(text, str | bytes) else getattr(text, "co_filename", "")))
    elif event == "pickle.find_class":
        seen.append("EVIL: something is unpickled")
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        seen.append(f"{event} {arguments}")

sys.addaudithook(watch)
resolution, source, binaries = resolve_binaries(spec, store)
assert (resolution.step, resolution.store) == ("exact", store), resolution
assert source.text == honest.text and not binaries.kernels
load_module(source)
for command in (("emit", str(spec)), ("explain", str(spec)), ("cache", "show", str(spec), "--source"), ("cache", "ls")):
    main([*command, "--store", store], standalone_mode=False)
assert any("compose_forward" in each for each in seen), "the hook sees what runs"
assert not any("EVIL" in each for each in seen), [each for each in seen if "EVIL" in each]
assert not Path(created).exists()
print("DONE")
"""


def test_a_store_full_of_python_has_none_of_it_run(tmp_path: Path) -> None:
    """An audit hook sees every text that is compiled and every code object that is run."""
    pytest.importorskip("triton")
    arguments = [str(tmp_path / name) for name in ("store.sqlite", "home")] + [str(SPEC), str(tmp_path / "evil")]
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, *arguments], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("DONE\n")
