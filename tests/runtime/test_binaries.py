"""A kernel with a stored binary is launched without a compile, from the bytes and metadata that Triton's compiler made.
If the binary differs in anything the kernel is compiled, with a warning if the binary is damaged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqlalchemy import text

import doratune
from doratune.cache import rows
from doratune.cache.entry import MEASURED, Binary, Entry, Environment, Evaluation
from doratune.cache.signing import SigningKey, binary_digest, read_signing_key
from doratune.cache.store import Store
from doratune.codegen import binary as binary_module
from doratune.codegen.binary import BinaryError, OtherSettingsError, check, restore
from doratune.codegen.compile import CompileError, contiguous_alignments
from doratune.codegen.fit import fitted
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import declared_kernels, load_module
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config
from doratune.internals.triton import why_compile
from doratune.runtime import binding as launch
from doratune.runtime import loader
from doratune.runtime.binding import bind
from doratune.runtime.kernel import Kernel
from doratune.runtime.loader import load_kernel, resolve_binaries
from doratune.tuner.workers import CompilePool

from ..cache.test_signing import write_key
from ..specs import read_by

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language")  # while the interpreter is on, or it cannot be loaded later

GPU = find_gpu("h200")
SPEC = KernelSpec.create("compose_backward", d_out=512, tokens=4096, dtype="bf16", gpu="h200")
OTHER_TOKENS = replace(SPEC, tokens=8192)


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.delenv("DORATUNE_TRUST", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path / "prebuilt")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # jit functions must be compiled, not interpreted
    loaded = dict(loader._loaded)
    yield
    loader._asked.clear()
    loader._loaded.clear()
    loader._loaded.update(loaded)


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    opened = CompilePool(GPU, jobs=1)
    yield opened
    opened.close()


def spec_of(
    op: str, d_out: int = 1024, d_in: int = 1024, rank: int = 64, tokens: int = 16, **values: object
) -> KernelSpec:
    sizes = {"d_out": d_out, "d_in": d_in, "rank": rank, "tokens": tokens}
    return KernelSpec.create(op, **{**sizes, "dtype": "bf16", "adapter": "bf16", "gpu": "h200", **values})


def config_of(spec: KernelSpec, variant: Variant) -> Config:
    return next(config for config in variant.seeds(spec, GPU) if check_config(spec, config, GPU) is None)


def source_of(spec: KernelSpec) -> Source:
    return render(spec, config_of(spec, next(variant for variant in VARIANTS if variant.op == spec.op)))


@pytest.fixture(scope="module")
def compiled(pool: CompilePool) -> tuple[Binary, ...]:
    """The binaries of SPEC, as tuning stores them."""
    return pool.binaries(source_of(SPEC)).result(120)


def entry_of(source: Source) -> Entry:
    return Entry(
        spec=source.spec,
        config=source.config,
        template_digest=template_digest(source.spec.op, source.config.variant),
        source_digest=source.digest,
        source=source.text,
        evaluation=Evaluation(MEASURED, us=20.0, floor_us=16.0),
        environment=Environment(gpu="h200", architecture="sm_90", triton=triton.__version__, gpu_name="NVIDIA H200"),
    )


@pytest.fixture
def store(tmp_path: Path, compiled: tuple[Binary, ...]) -> Store:
    opened = Store.open(tmp_path / "store.sqlite", create=True)
    opened.put(entry_of(source_of(SPEC)))
    for binary in compiled:
        opened.put_binary(binary)
    return opened


class FakeGpu:
    """A driver without a GPU: it records what is loaded and launched."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, bytes, int]] = []
        self.launchers: list[tuple[Any, Any]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.refuses: Exception | None = None
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": GPU.shared_bytes_per_block}
        )

    def get_current_target(self) -> Any:
        return GPU.triton_target()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.launchers.append((source, metadata))
        return lambda *args: self.launched.append(args)

    def _load(self, name: str, image: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        if self.refuses is not None:
            raise self.refuses
        self.loaded.append((name, image, shared))
        return 1, 1000 + len(self.loaded), 32, 0, 1024


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    from triton.compiler import compiler
    from triton.runtime import driver

    fake = FakeGpu()
    monkeypatch.setattr(type(driver), "active", fake, raising=False)
    compiler.max_shared_mem.cache_clear()
    return fake


class Compiles(CompileError):
    """Raised in place of a run of Triton's compiler."""


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*_: object, **__: object) -> None:
        raise Compiles

    monkeypatch.setattr(triton, "compile", compile)


# Restoring.


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.op}-{variant.name}")
def test_a_restored_kernel_is_the_compiled_one_without_its_intermediate_texts(
    variant: Variant, pool: CompilePool
) -> None:
    specs = [spec_of(variant.op, **read_by(variant, {"dtype": "bf16", "tokens": tokens})) for tokens in (16, 4096)]
    spec = next(spec for spec in specs if variant.unavailable(spec, GPU) is None)
    source = render(spec, config_of(spec, variant))
    made = pool.binaries(source).result(120)
    module = load_module(source)
    assert tuple(binary.kernel for binary in made) == declared_kernels(source)
    for binary in made:
        handle = restore(source, getattr(module, binary.kernel), GPU.triton_target(), binary.metadata, binary.image)
        assert [*handle.asm] == ["cubin"]
        assert handle.asm["cubin"] == handle.kernel == binary.image
        stored = json.loads(binary.metadata)
        del stored["doratune"]
        given = {name: value for name, value in handle.metadata._asdict().items() if name != "extern_libs"}
        assert json.loads(json.dumps(given, default=vars)) == stored
        assert handle.metadata.extern_libs[0][0] == "libdevice"
        assert (handle.name, handle.hash) == (binary.kernel, stored["hash"])
        assert handle.packed_metadata == (stored["num_warps"], stored["num_ctas"], stored["shared"])
        assert handle.src.fn is getattr(module, binary.kernel)


def test_a_binary_names_no_folder_of_the_machine_that_made_it(compiled: tuple[Binary, ...]) -> None:
    for binary in compiled:
        assert str(Path(triton.__file__).parent) not in binary.metadata


def test_specs_with_other_alignments_have_other_code() -> None:
    """One binary serves a code digest, so specs of one code must have one set of alignments."""
    for variant in VARIANTS:
        seen: dict[str, dict[str, int]] = {}
        for d_out in (1024, 1026, 1028, 1032):
            for d_in in (1024, 1026, 1032):
                for rank in (64, 66, 72):
                    values = read_by(variant, {"dtype": "bf16"})
                    spec = spec_of(variant.op, d_out=d_out, d_in=d_in, rank=rank, **values)
                    if variant.unavailable(spec, GPU) is not None:
                        continue
                    source = render(spec, config_of(spec, variant))
                    alignments = contiguous_alignments(spec)
                    assert seen.setdefault(source.code_digest, alignments) == alignments, (variant.name, spec)


# Finding and launching.


def test_a_kernel_with_its_binary_is_launched_without_a_compile(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    resolution, source, binaries = resolve_binaries(SPEC, store.location)
    assert (resolution.step, binaries.store, binaries.damaged) == ("exact", store.location, ())
    module = bind(source, contiguous_alignments(SPEC), binaries.kernels)
    assert gpu.loaded == [(binary.kernel, binary.image, json.loads(binary.metadata)["shared"]) for binary in compiled]
    for binary, (given, metadata) in zip(compiled, gpu.launchers, strict=True):
        assert given.fn.__name__ == metadata.name == binary.kernel
        assert [*given.signature] == given.fn.arg_names
        assert given.signature == {param.name: param.annotation for param in given.fn.params}
    getattr(module, compiled[0].kernel)[(3, 2)]("x", num_warps=4)
    assert gpu.launched == [(3, 2, 1, 7, 1001, gpu.launched[0][5], None, None, None, "x")]


def test_a_neighbouring_token_bucket_needs_no_binary_of_its_own(
    store: Store, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.codegen.variants.default_configs", lambda spec, gpu: (source_of(SPEC).config,))
    doubted = replace(fitted(), default_losses={})
    monkeypatch.setattr("doratune.codegen.fit.fitted", lambda: doubted)
    resolution, source, binaries = resolve_binaries(OTHER_TOKENS, store.location)
    assert resolution.step == "nearest"
    assert source.digest != source_of(SPEC).digest
    bind(source, None, binaries.kernels)
    assert len(gpu.loaded) == len(declared_kernels(source))


# The choice of the store.


SHARED = ("team", "stranger")
"""Stores that a group can write, whose binaries are therefore others'."""


@pytest.fixture(autouse=True)
def _no_private_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doratune.cache.permissions._private_group", lambda path, found: False)


def whole_stack(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    contents: dict[str, tuple[bool, tuple[Binary, ...]]],
    key: SigningKey | None = None,
) -> dict[str, str]:
    """Make stores with binaries, and with or without the entry; returns their locations. "user" and "prebuilt" are
    those stores; the others are on the search path, in this order. ``key`` signs all."""
    special = {"user": tmp_path / "home" / "store.sqlite", "prebuilt": tmp_path / "prebuilt" / "h200.sqlite"}
    places = {name: special.get(name, tmp_path / f"{name}.sqlite") for name in contents}
    for name, (has_entry, binaries) in contents.items():
        places[name].parent.mkdir(exist_ok=True)
        with Store.open(places[name], create=True) as store:
            if has_entry:
                store.put(entry_of(source_of(SPEC)))
            for binary in binaries:
                store.put_binary(binary)
                if key is not None:
                    store.put_signatures([key.sign(binary_digest(binary))])
        places[name].chmod(0o664 if name in SHARED else 0o644)
    named = [str(place) for name, place in places.items() if name not in special]
    monkeypatch.setenv("DORATUNE_CACHE_PATH", ":".join(named))
    return {name: str(place) for name, place in places.items()}


@pytest.mark.parametrize("other", ["own", "user", "prebuilt"])
def test_the_config_may_come_from_one_store_and_the_binary_from_your_own_or_a_prebuilt_one(
    other: str, gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = whole_stack(monkeypatch, tmp_path, {"team": (True, compiled), other: (False, compiled)})
    Path(at[other]).chmod(0o444)
    resolution, source, binaries = resolve_binaries(SPEC)
    assert (resolution.store, binaries.store) == (at["team"], at[other])
    bind(source, None, binaries.kernels)
    assert len(gpu.loaded) == len(compiled)


@pytest.mark.parametrize("holder", ["stranger", "named", "user", "prebuilt", None])
def test_a_store_that_others_can_write_gives_no_binary(
    holder: str | None, gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it has the entry, is searched first, or the built-in default is chosen."""
    monkeypatch.setattr("doratune.codegen.variants.default_configs", lambda spec, gpu: (source_of(SPEC).config,))
    contents = {"stranger": (holder == "stranger", compiled)}
    at = whole_stack(
        monkeypatch, tmp_path, contents | ({holder: (True, ())} if holder not in (None, "stranger") else {})
    )
    resolution, source, binaries = resolve_binaries(SPEC)
    assert resolution.store == (at[holder] if holder else None)
    assert binaries.explain().startswith(f"compiled at the first call: {at['stranger']}: its binaries are not used")
    assert f"can write {at['stranger']} (mode 664); chmod go-w {at['stranger']}" in binaries.explain()
    assert f"set DORATUNE_TRUST={at['stranger']}" in binaries.explain()
    assert (binaries.store, binaries.kernels, binaries.damaged) == (None, {}, ())
    with pytest.raises(Compiles):
        bind(source, None, binaries.kernels)


def test_a_store_that_others_can_write_gives_binaries_to_those_who_trust_it(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = whole_stack(monkeypatch, tmp_path, {"stranger": (False, compiled), "team": (True, compiled)})
    assert resolve_binaries(SPEC, trusted=[at["team"]])[2].store == at["team"]
    assert resolve_binaries(SPEC, trusted=[str(tmp_path)])[2].store == at["stranger"]
    monkeypatch.setenv("DORATUNE_TRUST", f"{tmp_path / 'another.sqlite'}:{at['team']}")
    assert resolve_binaries(SPEC)[2].store == at["team"]
    Path(at["team"]).chmod(0o666)
    binaries = resolve_binaries(SPEC)[2]
    assert binaries.store is None
    assert f"everybody can write {at['team']} (mode 666); chmod go-w {at['team']}" in binaries.explain()


def test_signed_binaries_are_used_in_whichever_store_they_are(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, stranger = (write_key(tmp_path / name) for name in ("key", "other"))
    at = whole_stack(monkeypatch, tmp_path, {"stranger": (False, compiled)}, stranger)
    at |= whole_stack(monkeypatch, tmp_path, {"team": (True, compiled)}, key)
    for store in at.values():
        Path(store).chmod(0o666)
    monkeypatch.setenv("DORATUNE_CACHE_PATH", ":".join(at.values()))
    assert resolve_binaries(SPEC)[2].store is None
    monkeypatch.setenv("DORATUNE_TRUST", str(tmp_path / "key.pub"))
    _, source, binaries = resolve_binaries(SPEC)
    assert binaries.store == at["team"]
    assert f"signed by {key.public.fingerprint}, for Triton" in binaries.explain()
    assert "is not signed by a trusted key, and everybody can write" in binaries.explain()
    assert binaries.damaged == ()
    bind(source, None, binaries.kernels)
    assert len(gpu.loaded) == len(compiled)


def test_a_signed_store_with_one_other_binary_gives_none(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another image, other metadata, and a signed image under another kernel's name."""
    write_key(tmp_path / "key")
    key = read_signing_key(tmp_path / "key")
    first, second = compiled[:2]
    shared = json.loads(first.metadata)["shared"]
    more = first.metadata.replace(f'"shared": {shared}', f'"shared": {shared + 16}')
    assert more != first.metadata
    for other in (
        replace(first, image=first.image + b"\0"),
        replace(first, metadata=more),
        replace(second, kernel=first.kernel),
    ):
        at = whole_stack(monkeypatch, tmp_path, {"team": (True, compiled)}, key)
        with Store.open(at["team"]) as store:
            store.put_binary(other)
        binaries = resolve_binaries(SPEC, trusted=[str(tmp_path / "key.pub")])[2]
        assert binaries.store is None
        assert f"{first.kernel} is not signed by a trusted key" in binaries.explain()


def test_a_signature_does_not_make_a_forged_launch_fact_true(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = write_key(tmp_path / "key")
    forged = tuple(
        replace(binary, metadata=json.dumps({**json.loads(binary.metadata), "shared": -1})) for binary in compiled
    )
    whole_stack(monkeypatch, tmp_path, {"team": (True, forged)}, key)
    binaries = resolve_binaries(SPEC, trusted=[str(tmp_path / "key.pub")])[2]
    assert binaries.store is None
    assert "shared=-1" in binaries.explain()


def test_explain_names_the_store_of_the_binary_and_those_passed_over(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = tuple(
        replace(binary, metadata=json.dumps({**json.loads(binary.metadata), "shared": -1})) for binary in compiled
    )
    at = whole_stack(
        monkeypatch,
        tmp_path,
        {
            "stranger": (False, compiled),
            "own": (True, forged),
            "user": (False, compiled[:1]),
            "prebuilt": (False, compiled),
        },
    )
    resolution, source, binaries = resolve_binaries(SPEC)
    assert (resolution.store, binaries.store) == (at["own"], at["prebuilt"])
    taken, *passed_over = binaries.explain().split("; passed over ")
    assert (
        taken == f"in {at['prebuilt']}, for Triton {triton.__version__} on sm_90: contiguous operands need no compile"
    )
    assert [reason.split(":")[0] for reason in passed_over] == [at["stranger"], at["own"], at["user"]]
    assert "shared=-1" in passed_over[1]
    assert "expected binaries of" in passed_over[2]
    assert list(binaries.damaged) == passed_over[1:]
    bind(source, None, binaries.kernels)
    assert len(gpu.loaded) == len(compiled)


def test_your_own_store_that_others_can_write_is_passed_over_with_a_warning(
    gpu: FakeGpu, tmp_path: Path, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = whole_stack(monkeypatch, tmp_path, {"user": (True, compiled)})
    (tmp_path / "home").chmod(0o777)
    binaries = resolve_binaries(SPEC)[2]
    assert binaries.store is None
    with pytest.warns(
        RuntimeWarning, match=f"everybody can write {tmp_path / 'home'} .*; chmod go-w {tmp_path / 'home'}"
    ):
        binaries.warn()
    (tmp_path / "home").chmod(0o755)
    assert resolve_binaries(SPEC)[2].store == at["user"]


# Operands.


def test_other_alignments_are_compiled(store: Store, gpu: FakeGpu) -> None:
    _, source, binaries = resolve_binaries(SPEC, store.location)
    with pytest.raises(Compiles):
        bind(source, {**contiguous_alignments(SPEC), "dy": 2}, binaries.kernels)
    assert gpu.loaded == []


def test_the_kernel_object_takes_its_binary_for_contiguous_operands_alone(
    store: Store, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        def __init__(self, _: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Here)
    resolution, source, binaries = resolve_binaries(SPEC, store.location)
    kernel = Kernel(SPEC, torch.device("cuda", 0), resolution, source, binaries)
    plain = tuple(contiguous_alignments(SPEC).values())
    kernel.bind(plain)
    assert len(gpu.loaded) == len(declared_kernels(source))
    with pytest.raises(Compiles):
        kernel.bind((2, *plain[1:]))


def test_load_kernel_finds_the_binary_and_explain_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(loader, "gpu_of", lambda device: GPU)
    shape: dict[str, Any] = {"d_out": 512, "d_in": 256, "rank": 8, "tokens": 4096, "device": torch.device("cuda", 0)}
    kernel = load_kernel("compose_backward", **shape, store=store.location)
    line = f"binary    in {store.location}, for Triton {triton.__version__} on sm_90"
    assert line in kernel.explain()
    assert kernel.explain() == doratune.explain(SPEC, store.location)


# Other and damaged binaries.


def without_binary(change: Callable[[Store], None], store: Store, gpu: FakeGpu) -> str:
    """Load and bind after ``change``, which must cause a compile. Returns the explanation of the binary."""
    change(store)
    _, source, binaries = resolve_binaries(SPEC, store.location)
    with pytest.raises(Compiles):
        bind(source, None, binaries.kernels)
    assert gpu.loaded == []
    assert binaries.store is None
    return binaries.explain()


def sql(statement: str, **values: object) -> Callable[[Store], None]:
    def change(store: Store) -> None:
        with store._writer.begin() as connection:
            connection.execute(text(statement), values)

    return change


def test_a_missing_binary_of_this_triton_or_architecture_is_not_damage(store: Store, gpu: FakeGpu) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = without_binary(sql("DELETE FROM doratune_binaries"), store, gpu)
    assert said == f"compiled at the first call: no store has a binary for Triton {triton.__version__} on sm_90"


@pytest.mark.parametrize("name", ["triton", "architecture", "code_digest"])
def test_a_binary_of_another_triton_architecture_or_code_is_not_taken(
    name: str, store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    def other(store: Store) -> None:
        sql("DELETE FROM doratune_binaries")(store)
        for binary in compiled:
            store.put_binary(replace(binary, **{name: "another"}))

    assert "no store has a binary" in without_binary(other, store, gpu)


GONE = object()


def edited(compiled: tuple[Binary, ...], **values: object) -> Callable[[Store], None]:
    """Store the binaries again with other metadata and a valid checksum."""

    def change(store: Store) -> None:
        for binary in compiled:
            metadata = {**json.loads(binary.metadata), **values}
            kept = {name: value for name, value in metadata.items() if value is not GONE}
            store.put_binary(replace(binary, metadata=json.dumps(kept)))

    return change


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"num_stages": 7}, "num_stages=7"),
        ({"debug": True}, "debug=True"),
        ({"arch": "sm80"}, "arch='sm80'"),
        ({"triton_version": "2.0"}, "triton_version='2.0'"),
        ({"target": {"backend": "cuda", "arch": 80, "warp_size": 32}}, "target.arch=80"),
        ({"name": "another_kernel"}, "metadata does not belong to"),
        ({"doratune": GONE}, "metadata does not belong to"),
        ({"enable_fp_fusion": GONE}, "lacks enable_fp_fusion"),
    ],
)
def test_metadata_of_another_compile_is_refused_when_loading(
    values: dict[str, object], complaint: str, store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    assert complaint in without_binary(edited(compiled, **values), store, gpu)


ATTACKS: dict[str, tuple[dict[str, object], str]] = {
    "maps beyond an array of the host's": ({"tensordesc_meta": [{"block_size": [64] * 1090}]}, "tensordesc_meta"),
    "less than no shared memory": ({"shared": -1}, "shared=-1"),
    "no shared memory": ({"shared": GONE}, "lacks shared"),
    "more shared memory than there is": ({"shared": 1 << 20}, f"shared={1 << 20}"),
    "a word for a number": ({"shared": "much"}, "shared='much'"),
    "more warps": ({"num_warps": 64}, "num_warps=64"),
    "endless scratch": ({"global_scratch_size": 2**60}, "global_scratch_size="),
    "another name": ({"not a name": 1}, "'not a name'"),
    "another path": ({"extern_libs": [["libdevice", "/tmp/x.bc"]]}, "'extern_libs'"),
}


@pytest.mark.parametrize(("values", "complaint"), ATTACKS.values(), ids=ATTACKS.keys())
def test_forged_launch_facts_are_refused_at_the_lookup_with_one_warning(
    values: dict[str, object], complaint: str, store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    assert complaint in without_binary(edited(compiled, **values), store, gpu)
    with pytest.warns(RuntimeWarning, match="doratune compiles a kernel instead of using its stored binary") as told:
        resolve_binaries(SPEC, store.location)[2].warn()
    assert len(told) == 1
    assert complaint in str(told[0].message)


def test_a_binary_for_other_parameters_is_refused_at_the_lookup(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    for part, change in (("attributes", [16]), ("signature", ["scaling", "fp32"])):
        assumed = json.loads(compiled[0].metadata)["doratune"]
        assumed[part][0] = change
        assert f"doratune.{part}[0]" in without_binary(edited(compiled[:1], doratune=assumed), store, gpu)


def test_garbage_and_other_kernels_images_are_refused_at_the_lookup(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    first, second = compiled[:2]
    for image, complaint in (
        (b"garbage", "not a 64-bit ELF"),
        (first.image[:-9], "cut off"),
        (second.image, f"the kernel '{second.kernel}'"),
    ):
        store.put_binary(replace(first, image=image))
        assert complaint in without_binary(lambda _: None, store, gpu)


def test_a_binary_that_passed_the_lookup_is_checked_again_when_it_is_loaded(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    _, source, binaries = resolve_binaries(SPEC, store.location)
    first = compiled[0]
    for forged in (replace(first, image=b"garbage"), replace(first, metadata="{}")):
        with pytest.warns(RuntimeWarning, match=first.kernel), pytest.raises(Compiles):
            bind(source, None, {**binaries.kernels, first.kernel: forged})
    assert gpu.loaded == []


def test_a_binary_that_the_driver_refuses_is_compiled_with_a_warning(store: Store, gpu: FakeGpu) -> None:
    gpu.refuses = RuntimeError("device kernel image is invalid")
    _, source, binaries = resolve_binaries(SPEC, store.location)
    with pytest.warns(RuntimeWarning, match="kernel image is invalid"), pytest.raises(Compiles):
        bind(source, None, binaries.kernels)


@pytest.mark.parametrize(("column", "value"), [("image", b"\x7fELF"), ("metadata", "{}"), ("metadata", "not JSON")])
def test_a_damaged_row_gives_one_warning_and_a_compile(column: str, value: object, store: Store, gpu: FakeGpu) -> None:
    said = without_binary(sql(f"UPDATE doratune_binaries SET {column} = :value", value=value), store, gpu)
    assert "Delete row" in said
    assert store.location in said
    _, _, binaries = resolve_binaries(SPEC, store.location)
    with pytest.warns(RuntimeWarning, match="doratune compiles a kernel instead of using its stored binary") as told:
        binaries.warn()
    assert len(told) == 1


HOSTILE_VALUES: list[tuple[str, object]] = [
    *(
        ("metadata", value)
        for value in ("", "{", "x" * 100_000, b"{}", 7, 1.5, "\x1b[2J", '{"a":' * 20_000, "9" * 5000)
    ),
    *(("metadata", f'{{"shared": {text}}}') for text in ("9" * 5000, "1e999", "NaN", "-Infinity", "[" * 30_000)),
    *(("image", value) for value in (b"", b"doratune-1\0", b"\0" * 100_000, "text", 7, b"doratune-1\0" + bytes(1000))),
    *(("kernel", value) for value in ("x" * 100_000, b"bytes", 7, "[/b]", "\x1b[2J\n")),
]


@pytest.mark.parametrize(("column", "value"), HOSTILE_VALUES, ids=lambda part: repr(part)[:20])
def test_a_hostile_value_in_any_column_gives_a_short_printable_reason(
    column: str, value: object, store: Store, gpu: FakeGpu
) -> None:
    said = without_binary(sql(f"UPDATE doratune_binaries SET {column} = :value WHERE id = 1", value=value), store, gpu)
    assert len(said) < 1000
    assert said.isprintable()


def test_a_lookup_unpacks_the_kernels_that_it_wants_alone_and_only_to_a_limit(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kilobyte of xz unpacks to megabytes, and a store may have thousands of rows of this code."""
    large = bytes(8 << 20)
    for number in range(20):
        store.put_binary(replace(compiled[0], kernel=f"kernel_{number}", image=large[: 1 << 20]))
    unpacked: list[int] = []
    original = rows._unpacked

    def counting(compressed: bytes) -> bytes:
        unpacked.append(len(compressed))
        return original(compressed)

    monkeypatch.setattr(rows, "_unpacked", counting)
    assert resolve_binaries(SPEC, store.location)[2].store == store.location
    assert len(unpacked) == len(compiled)
    store.put_binary(replace(compiled[0], image=large + b"\0"))
    assert "larger than any kernel" in resolve_binaries(SPEC, store.location)[2].explain()


def test_a_missing_kernel_of_several_gives_a_warning_and_a_compile(store: Store, gpu: FakeGpu) -> None:
    said = without_binary(sql("DELETE FROM doratune_binaries WHERE id = 1"), store, gpu)
    assert "expected binaries of" in said


def test_bind_does_not_take_some_kernels_and_compile_others(
    store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]
) -> None:
    with pytest.warns(RuntimeWarning, match="has no stored binary"), pytest.raises(Compiles):
        bind(source_of(SPEC), None, {compiled[0].kernel: compiled[0]})


@pytest.mark.parametrize(
    ("knob", "variable"),
    [
        ("always_compile", "TRITON_ALWAYS_COMPILE"),
        ("override", "TRITON_KERNEL_OVERRIDE"),
        ("dump_ir", "TRITON_KERNEL_DUMP"),
    ],
)
def test_a_request_to_triton_to_compile_disables_stored_binaries(
    knob: str, variable: str, store: Store, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_compile() is None
    found = resolve_binaries(SPEC, store.location)[2]
    monkeypatch.setenv(variable, "1")
    assert without_binary(lambda _: None, store, gpu) == f"compiled at the first call: {variable} is set"
    with pytest.raises(Compiles):
        bind(source_of(SPEC), None, found.kernels)


def test_options_from_the_environment_cause_a_compile_without_a_warning(
    store: Store, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve_binaries(SPEC, store.location)[2]
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "enable_fp_fusion=True, expected False" in without_binary(lambda _: None, store, gpu)
        with pytest.raises(Compiles):
            bind(source_of(SPEC), None, found.kernels)


def test_compiler_variables_in_the_key_of_tritons_cache_cause_a_compile(
    compiled: tuple[Binary, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, binary = source_of(SPEC), GPU.triton_target(), compiled[0]
    check(source, binary.kernel, target, binary.metadata, binary.image)
    monkeypatch.setattr(binary_module, "cache_environment", lambda: {"TRITON_ENABLE_SOMETHING": "1"})
    with pytest.raises(OtherSettingsError, match="environment"):
        check(source, binary.kernel, target, binary.metadata, binary.image)


def test_metadata_is_never_executed(compiled: tuple[Binary, ...]) -> None:
    source, target = source_of(SPEC), GPU.triton_target()
    for metadata in ("__import__('os')", "[]", "null", '{"__class__": "x"}'):
        with pytest.raises(BinaryError, match="metadata does not belong to"):
            check(source, compiled[0].kernel, target, metadata, compiled[0].image)


def test_bind_without_binaries_compiles(gpu: FakeGpu) -> None:
    with pytest.raises(Compiles):
        launch.bind(source_of(SPEC))
