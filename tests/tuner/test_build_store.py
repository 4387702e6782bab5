"""A store that ``cache build`` wrote starts every kernel of its model without a compile. ``cache verify`` proves it,
and finds every kernel, binary or row that is missing or wrong. ``export`` takes a model's entries alone."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from doratune.cache.entry import DEFAULT, MEASURED, BinaryKey
from doratune.cache.signing import PublicKey, signers
from doratune.cache.stack import PACKAGED
from doratune.cache.store import Store
from doratune.cli import main
from doratune.codegen.module import declared_kernels
from doratune.codegen.render import Source
from doratune.codegen.spec import KernelSpec
from doratune.runtime import loader
from doratune.runtime.loader import resolve_binaries
from doratune.tuner.projections import ModelConfigError
from doratune.tuner.reachable import _targets

from ..command_line import RUNNER

pytest.importorskip("triton.experimental.gluon.language")  # while the interpreter is on, or it cannot be loaded later
pytest.importorskip("peft")
pytest.importorskip("transformers")

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 96,
}
MODEL = ("--rank", "16", "--target", "o_proj", "--tokens", "16", "--gpu", "h100-sxm")


def run(*args: str, home: Path, trust: str | None = None) -> Result:
    env = {"DORATUNE_HOME": str(home), "DORATUNE_CACHE_PATH": None, "DORATUNE_TRUST": trust}
    return RUNNER.invoke(main, ["cache", *args], env=env)


def done(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _no_prebuilt_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path / "prebuilt")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    loader._asked.clear()


@dataclass(frozen=True)
class Built:
    config: str
    path: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tiny model's kernels for an H100, really compiled."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "config.json").write_text(json.dumps(TINY))
    path = folder / "tiny.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("doratune.cache.stack._PREBUILT_FOLDER", folder / "prebuilt")
        patch.delenv("TRITON_INTERPRET", raising=False)
        said = run("build", "--config", str(folder), *MODEL, "-o", str(path), "--jobs", "2", "--json", home=folder)
    return Built(str(folder), path, done(said))


def verify(built: Built, *args: str, home: Path) -> Result:
    return run("verify", "--config", built.config, *MODEL, *args, home=home)


def changed(built: Built, tmp_path: Path, *statements: str) -> Path:
    """A copy of the store in which statements of SQL have run."""
    copy = tmp_path / "changed.sqlite"
    shutil.copy(built.path, copy)
    with closing(sqlite3.connect(copy)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount, "the statement changes something"
    return copy


def test_it_has_an_entry_and_a_binary_of_every_kernel(built: Built) -> None:
    with Store.open(built.path, readonly=True) as store:
        entries = store.entries()
        assert len(entries) == built.said["kernels"] > 5
        assert {entry.evaluation.provenance for entry in entries} == {DEFAULT}, "no store has a measured one"
        assert {entry.spec.op for entry in entries} >= {"lora_compose", "weight_norm_group", "adapter_backward"}
        for entry in entries:
            names = declared_kernels(Source(entry.spec, entry.config, entry.source))
            assert {key.kernel for key in store.binary_keys(entry.code_digest)} == {*names}
        assert len(store.binary_keys()) == built.said["binaries"] == built.said["compiled"]
    assert built.said["bytes"] == built.path.stat().st_size


def test_a_lookup_with_it_finds_the_same_config_and_its_binary(built: Built) -> None:
    with Store.open(built.path, readonly=True) as store:
        entries = store.entries()
    for entry in entries:
        resolution, source, binaries = resolve_binaries(entry.spec, str(built.path))
        assert (resolution.step, source.digest) == ("exact", entry.source_digest)
        assert binaries.store == str(built.path)


def test_verify_certifies_it(built: Built, tmp_path: Path) -> None:
    for options in (["--no-jit"], []):
        found = done(verify(built, "--store", str(built.path), *options, "--json", home=tmp_path))
        assert (found["complete"], found["missing"], found["kernels"]) == (True, [], built.said["kernels"])


def test_without_the_store_every_kernel_is_missing_and_listed(built: Built, tmp_path: Path) -> None:
    result = verify(built, "--no-jit", home=tmp_path)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == built.said["kernels"]
    assert all(": no store has a binary for Triton" in line for line in result.stdout.splitlines())
    assert f"{built.said['kernels']} of {built.said['kernels']} kernels" in result.stderr


def test_one_missing_binary_or_entry_is_found(built: Built, tmp_path: Path) -> None:
    with Store.open(built.path, readonly=True) as store:
        entry = next(entry for entry in store.entries() if entry.spec.op == "adapter_backward")
    gone = changed(built, tmp_path, f"DELETE FROM doratune_binaries WHERE source_digest = '{entry.code_digest}'")
    result = verify(built, "--no-jit", "--store", str(gone), "--json", home=tmp_path)
    assert result.exit_code == 1
    assert [each["spec"] for each in json.loads(result.stdout)["missing"]] == [str(entry.spec)]
    assert verify(built, "--store", str(gone), home=tmp_path).exit_code == 0, "its entry is there"


def test_a_call_of_more_tokens_or_another_rank_is_not_covered(built: Built, tmp_path: Path) -> None:
    other = [*MODEL[:5], "4096", *MODEL[6:]]
    result = run("verify", "--config", built.config, *other, "--store", str(built.path), home=tmp_path)
    assert result.exit_code == 1
    assert "tokens=4096/" in result.stdout
    assert "tokens=16/" not in result.stdout


def test_verify_without_a_model_finds_nothing_wrong_with_it(built: Built, tmp_path: Path) -> None:
    (checked,) = done(run("verify", "--store", str(built.path), "--json", home=tmp_path))["stores"]
    assert checked["problems"] == []
    assert (checked["entries"], checked["elsewhere"]) == (built.said["kernels"], 0)


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM doratune_entries WHERE op = 'adapter_backward'", "orphan"),
        ("DELETE FROM doratune_binaries WHERE id IN (SELECT max(id) FROM doratune_binaries)", "unreadable"),
        ("UPDATE doratune_binaries SET image = substr(image, 1, 99) WHERE id = 1", "damaged"),
        ("UPDATE doratune_entries SET config = '{' WHERE op = 'adapter_backward'", "damaged"),
        ("UPDATE doratune_entries SET source = source || '#' WHERE op = 'adapter_backward'", "damaged"),
        ("UPDATE doratune_schema SET version_num = '9999'", "damaged"),
    ],
)
def test_verify_finds_what_is_wrong_with_a_store(statement: str, kind: str, built: Built, tmp_path: Path) -> None:
    if kind == "unreadable":  # one of several kernels of a source
        with Store.open(built.path, readonly=True) as store:
            code = next(
                entry.code_digest
                for entry in store.entries()
                if len(declared_kernels(Source(entry.spec, entry.config, entry.source))) > 1
            )
        last = f"SELECT max(id) FROM doratune_binaries WHERE source_digest = '{code}'"
        statement = f"DELETE FROM doratune_binaries WHERE id = ({last})"
    copy = changed(built, tmp_path, statement)
    result = run("verify", "--store", str(copy), "--json", home=tmp_path)
    assert result.exit_code == 1
    kinds = {problem["kind"] for checked in json.loads(result.stdout)["stores"] for problem in checked["problems"]}
    assert kind in kinds


def test_a_build_that_exists_is_left_and_replace_copies_what_it_has(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    shutil.copy(built.path, copy)
    arguments = ("build", "--config", built.config, *MODEL, "-o", str(copy), "--store", str(built.path), "--json")
    refused = run(*arguments, home=tmp_path)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "is left as it is" in refused.stderr
    again = done(run(*arguments, "--replace", home=tmp_path))
    assert (again["compiled"], again["copied"]) == (0, built.said["compiled"])


def test_a_kernel_that_does_not_compile_leaves_no_file(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .fakes import FakePool

    monkeypatch.setattr("doratune.tuner.build_store.CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "wait", lambda self, futures: None, raising=False)
    monkeypatch.setattr(FakePool, "close", lambda self: None, raising=False)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: ValueError("ptxas: too much")))
    output = tmp_path / "none.sqlite"
    result = run("build", "--config", built.config, *MODEL, "-o", str(output), home=tmp_path)
    assert result.exit_code == 1
    assert "kernels do not compile for h100-sxm, so no store is written" in result.stderr
    assert "ptxas: too much" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--gpu", "h200", "-o", "x"], "name a model"),
        (["build", "--model", "llama-9b", "--gpu", "h200", "-o", "x"], "unknown model 'llama-9b'"),
        (["verify", "--model", "llama-8b", "--gpu", "h20"], "unknown GPU 'h20'"),
        (["verify", "--no-jit"], "--no-jit asks for the kernels of a model"),
        (["build", "--config", "CONFIG", "--gpu", "h200", "--sign", "/no/key", "-o", "x"], "/no/key"),
    ],
)
def test_a_wrong_request_names_the_fault(arguments: list[str], said: str, built: Built, tmp_path: Path) -> None:
    given = [built.config if argument == "CONFIG" else argument for argument in arguments]
    result = run(*given, home=tmp_path)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_a_target_that_no_layer_has_is_named() -> None:
    with pytest.raises(ModelConfigError, match=r"no linear layer 'qproj' to adapt \(it has o_proj, q_proj\)"):
        _targets(["layers.0.q_proj", "layers.0.o_proj"], ["qproj"])


# Export.


@pytest.fixture
def own(built: Built, tmp_path: Path) -> Path:
    """The user's own store: the tiny model's kernels, of which one is measured, and a kernel of another shape."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(built.path, home / "store.sqlite")
    with Store.open(home / "store.sqlite") as store:
        (entry,) = [entry for entry in store.entries() if entry.spec.op == "adapter_backward"]
        evaluation = replace(entry.evaluation, provenance=MEASURED, us=9.0, floor_us=3.0)
        other = KernelSpec.create("adapter_backward", d_out=96, rank=16, dtype="bf16", adapter="bf16", gpu="h100-sxm")
        store.put_all([replace(entry, evaluation=evaluation), replace(entry, spec=other)])
    return home


def test_export_takes_the_models_entries_with_their_binaries(built: Built, own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.sqlite"
    said = done(run("export", "--config", built.config, "--gpu", "h100-sxm", "-o", str(output), "--json", home=own))
    with Store.open(output, readonly=True) as store:
        entries = store.entries()
        assert len(entries) == said["entries"] > 3
        assert not [entry for entry in entries if entry.spec.d_out == 96]
        assert [e.evaluation.us for e in entries if e.spec.op == "adapter_backward"] == [9.0]
        assert {key.code_digest for key in store.binary_keys()} == {entry.code_digest for entry in entries}
    bare = done(run("export", "-o", str(output), "--no-binaries", "--replace", "--json", home=own))
    assert (bare["entries"], bare["binaries"]) == (built.said["kernels"] + 1, 0)
    assert run("export", "--gpu", "a100-sxm-80gb", "-o", str(tmp_path / "x"), home=own).exit_code != 0


def test_export_signs_with_a_key(built: Built, own: Path, tmp_path: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    private = ed25519.Ed25519PrivateKey.generate()
    key = tmp_path / "key"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(private.private_bytes(encoding, form, serialization.NoEncryption()))
    key.chmod(0o600)
    output = tmp_path / "signed.sqlite"
    done(run("export", "-o", str(output), "--sign", str(key), "--json", home=own))
    public = PublicKey(private.public_key().public_bytes_raw())
    with Store.open(output, readonly=True) as store:
        rows = [*store.entries(), *store.binaries()]
        assert {*signers(store, rows, [public])} == {public}


def test_merge_and_diff_on_the_command_line(built: Built, own: Path, tmp_path: Path) -> None:
    differ = done(run("diff", str(built.path), str(own / "store.sqlite"), "--json", home=own))
    assert {each["where"] for each in differ["entries"]} == {"both", "second"}
    assert run("diff", str(built.path), str(own / "store.sqlite"), "--check", home=own).exit_code == 1
    target = tmp_path / "target.sqlite"
    sources = [str(built.path), str(own / "store.sqlite")]
    plan = done(run("merge", *sources, "--store", str(target), "--dry-run", "--json", home=own))
    assert {change["action"] for change in plan["changes"]} == {"add"}
    assert not target.exists()
    made = done(run("merge", *sources, "--store", str(target), "--json", home=own))
    assert made["changes"] == plan["changes"]
    assert made["binaries"] == built.said["binaries"]
    assert run("diff", str(target), sources[1], "--check", home=own).exit_code == 0
    again = run("merge", *sources, "--store", str(target), home=own)
    assert "0 entries added, 0 replaced" in again.stderr


def test_a_wheel_of_it_is_found_by_every_lookup_once_it_is_installed(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = done(run("package", str(built.path), "-o", str(tmp_path / "dist"), "--json", home=tmp_path))
    wheel = Path(said["path"])
    again = done(run("package", str(built.path), "-o", str(tmp_path / "again"), "--json", home=tmp_path))
    assert Path(again["path"]).read_bytes() == wheel.read_bytes()
    assert wheel.name.startswith("doratune_cache_sm90-")
    assert (said["entries"], said["binaries"]) == (built.said["kernels"], built.said["binaries"])
    assert said["bytes"] == wheel.stat().st_size
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=120)
    before = verify(built, "--no-jit", home=tmp_path)
    assert before.exit_code == 1
    monkeypatch.syspath_prepend(str(target))
    assert done(verify(built, "--no-jit", "--json", home=tmp_path))["complete"]
    (place,) = done(run("path", "--json", home=tmp_path))["stores"]
    assert (place["origin"], Path(place["location"]).parent) == ("prebuilt", target / "doratune_stores")
    assert PACKAGED not in sys.modules, "nothing of it is imported"


def test_a_package_has_binaries_for_one_triton(built: Built, tmp_path: Path) -> None:
    bare = tmp_path / "bare.sqlite"
    with Store.open(built.path, readonly=True) as store:
        store.export(bare, binaries=False)
    result = run("package", str(bare), "-o", str(tmp_path), home=tmp_path)
    assert result.exit_code == 2
    assert "one architecture and Triton, these stores have: none" in result.stderr


def test_binaries_of_another_triton_are_counted_and_not_judged(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "other.sqlite"
    shutil.copy(built.path, copy)
    with Store.open(copy) as store:
        one = store.binaries()[0]
        store.put_binary(replace(one, triton="9.9.9"))
        assert BinaryKey(one.code_digest, one.kernel, "9.9.9", one.architecture) in store.binary_keys()
    (checked,) = json.loads(run("verify", "--store", str(copy), "--json", home=tmp_path).stdout)["stores"]
    assert checked["elsewhere"] == 1


@pytest.mark.parametrize(("name", "more"), [("file/b.sqlite", []), ("file", ["--replace"])])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled(
    name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.tuner.build_store.reachable_specs", lambda reach: pytest.fail("the work began"))
    (tmp_path / "file").write_text("precious")
    command = ["cache", "build", "--model", "llama-8b", "--gpu", "h200", "-o", str(tmp_path / name), *more]
    refused = RUNNER.invoke(main, command)
    assert refused.exit_code == 1, refused.output
    assert "cannot be made in" in refused.stderr or "is left as it is; name another" in refused.stderr
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["cache", "merge", "any.sqlite", "--store", ""], "'--store': it is empty"),
        (["cache", "build", "--model", "llama-8b", "-o", "b.sqlite", "--jobs", "1000000000000"], "'--jobs'"),
        (["doctor", "--model", ""], "unknown model ''"),
    ],
)
def test_what_is_empty_or_absurd_is_refused(
    command: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    refused = RUNNER.invoke(main, command)
    assert refused.exit_code == 2, refused.output
    assert told in refused.stderr
    assert not (tmp_path / "home").exists(), "an unset variable does not mean one's own store"
