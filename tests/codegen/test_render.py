"""Emitted text is specialised: no masks where the shape divides, no bias code without bias, widths written out; and it
changes only when someone means it to: two goldens for each variant to read, and digests for all its other forms."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import TEMPLATES, render, template_digest, template_files
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import VARIANTS, Variant, find_variant

from ..specs import EVEN, RAGGED, every_variant, read_by

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
DIGESTS = GOLDENS / "digests.json"
H200 = find_gpu("h200")
MEANT = "if the change is meant, run pytest tests/codegen/test_render.py --update-goldens"

RICH = {
    "weight_norm": {"magnitude": "fp32", "save": True},
    "weight_norm_exact": {"magnitude": "fp32", "autocast": True},
    "weight_norm_group": {"adapter": "fp32", "autocast": True},
    "lora_compose": {"bias": True, "save": True},
    "compose_forward": {"bias": True, "save": True},
    "compose_backward": {"bias": True},
    "compose_backward_exact": {"magnitude": "fp32", "autocast": True},
    "adapter_backward": {"magnitude": "fp32"},
    "compose_swiglu": {"bias": True, "gelu_tanh": True},
    "compose_swiglu_backward": {"bias": True, "magnitude": "fp32", "gelu": True},
    "swiglu_forward": {"bias": True, "gelu_tanh": True},
    "swiglu_backward": {"bias": True, "magnitude": "fp32", "gelu": True},
    "lora_compose_group": {"bias": True, "d_out_2": 1024, "d_out_3": 520},
    "compose_backward_group": {"magnitude": "fp32", "d_out_2": 1024, "d_out_3": 520},
    "dora_linear_forward": {"bias": True, "save": True},
    "weight_dequantise": {},
}
"""The flags that show most of an operation's code together."""

DTYPES = [
    {"dtype": "bf16", "adapter": "bf16"},
    {"dtype": "bf16", "adapter": "fp32"},
    {"dtype": "bf16", "adapter": "fp32", "autocast": True},
    {"dtype": "fp16", "adapter": "fp16"},
    {"dtype": "fp16", "adapter": "fp32"},
    {"dtype": "fp32", "adapter": "fp32"},
]


def text_of(variant: Variant, values: dict[str, object], **flags: object) -> str:
    spec = KernelSpec.create(variant.op, **read_by(variant, {**values, **flags}))
    return render(spec, variant.seeds(spec, H200)[0]).text


def biased(variant: Variant) -> dict[str, bool]:
    return {"bias": True} if "bias" in OPS[variant.op].flags else {}


def serves(variant: Variant, values: dict[str, object]) -> bool:
    """Whether there is such a spec, which the variant runs for many tokens or for few."""
    contract = OPS[variant.op]
    if values.get("autocast") and "autocast" not in contract.flags:
        return False
    return any(
        variant.unavailable(KernelSpec.create(variant.op, **read_by(variant, {**values, "tokens": tokens})), H200)
        is None
        for tokens in (4096, 16)
    )


def golden_cases() -> dict[str, tuple[Variant, dict[str, object]]]:
    """For each variant a plain text of even sizes, and one of ragged sizes that shows most of its flags and dtypes."""
    cases: dict[str, tuple[Variant, dict[str, object]]] = {}
    for variant in VARIANTS:
        name = f"{variant.op}_{variant.name}"
        cases[name] = (variant, EVEN)
        rich = {**RAGGED, **RICH[variant.op], "adapter": "fp32"}
        mixed = {"dtype": "fp16"} if variant.library else {}  # both products of cuBLAS that depend on settings
        wanted = [{**rich, **mixed}, {**rich, "autocast": True}, {**RAGGED, **RICH[variant.op]}]
        wanted += [{**rich, "autocast": True, "bias": False}]
        cases[f"{name}_rich"] = (variant, next(values for values in wanted if serves(variant, values)))
    return cases


@pytest.mark.parametrize("name", golden_cases())
def test_emitted_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    variant, values = golden_cases()[name]
    text, golden = text_of(variant, values), GOLDENS / f"{name}.py"
    if request.config.getoption("--update-goldens"):
        golden.write_text(text)
    assert golden.read_text() == text, MEANT


def test_there_is_no_golden_without_a_case() -> None:
    assert {path.stem for path in GOLDENS.glob("*.py")} == set(golden_cases())


def forms(variant: Variant) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Each form of a variant, by the flag or optional dtype that it has: in all dtypes, of even and of ragged sizes."""
    contract = OPS[variant.op]
    singles = [{flag: True} for flag in contract.flags if flag != "autocast"]
    for added in [{}, *singles, *({role: "fp32"} for role in contract.optional_dtypes)]:
        given = [{**sizes, **dtypes, **added} for dtypes in DTYPES for sizes in (EVEN, RAGGED)]
        yield "-".join([variant.op, variant.name, *added]), [values for values in given if serves(variant, values)]


def test_the_text_of_every_other_form_is_as_it_was(request: pytest.FixtureRequest) -> None:
    """Goldens that nobody reads: their digests name the form whose text has changed."""
    digests = {
        name: hashlib.sha256("".join(text_of(variant, values) for values in given).encode()).hexdigest()
        for variant in VARIANTS
        for name, given in forms(variant)
    }
    if request.config.getoption("--update-goldens"):
        DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")
    kept = json.loads(DIGESTS.read_text())
    assert digests.keys() == kept.keys(), MEANT
    assert [name for name in digests if digests[name] != kept[name]] == [], MEANT


EDGES = ("in_t", "< chunks", "mask=needed", "tiny", "counters <", "tile_row", "(group == 0)", "mask=i < ")
EDGES += ("mask=(r < RANK - start)",)
"""Masks of what no size says: tokens, gains, one of several programs that have equal sums, the shorter of A and B, and
ranks that one tile covers."""


@every_variant
def test_where_the_shape_divides_only_the_token_edge_is_masked(variant: Variant) -> None:
    text = text_of(variant, EVEN)
    masked = [line for line in text.splitlines() if "mask=" in line]
    assert all(any(edge in line for edge in EDGES) for line in masked), masked
    assert any("mask=" in line for line in text_of(variant, RAGGED).splitlines())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if biased(v)], ids=lambda v: f"{v.op}-{v.name}")
def test_without_bias_there_is_no_trace_of_it(variant: Variant) -> None:
    assert "bias" not in text_of(variant, EVEN).replace("db = sum_t dY", "").split('"""', 2)[2]
    assert re.search(r"bias\w*_ptr", text_of(variant, EVEN, bias=True))


@every_variant
def test_emitted_text_reads_like_a_kernel_someone_wrote(variant: Variant) -> None:
    forms = [EVEN, RAGGED]
    if "autocast" in OPS[variant.op].flags:
        forms += [{**v, "adapter": "fp32", "autocast": autocast} for v in (EVEN, RAGGED) for autocast in (False, True)]
    if variant.library:
        forms += [{**v, "dtype": dtype, "adapter": "fp32"} for v in (EVEN, RAGGED) for dtype in ("fp16", "fp32")]
    for values in forms:
        text = text_of(variant, values)
        tree = ast.parse(text)
        docstring = ast.get_docstring(tree) or ""
        spec = KernelSpec.create(variant.op, **read_by(variant, values))
        assert str(spec) in docstring
        assert str(variant.seeds(spec, H200)[0]) in docstring
        assert spec.contract.maths in docstring
        assert all(ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        assert "{{" not in text
        assert "{%" not in text
        assert "\n\n\n\n" not in text
        assert not any(line.endswith(" ") for line in text.splitlines())
        for function in (
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        ):
            named = {
                n.target.id
                for n in ast.walk(function)
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            }
            used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            assert named <= used, f"{function.name} names constants it does not use: {named - used}"


def test_kernels_that_differ_only_in_bucket_share_their_code() -> None:
    config = Config.parse("tile:block_n=128,block_t=128,block_k=64,num_warps=8,num_stages=3")
    small, large = (
        render(KernelSpec.create("lora_compose", **{**EVEN, "tokens": tokens}), config) for tokens in (512, 8192)
    )
    assert small.digest != large.digest
    assert small.code_digest == large.code_digest


def test_a_template_digest_covers_what_the_template_brings_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    from doratune.codegen import render as module

    before = template_digest("weight_norm", "fused")
    shutil.copytree(module.TEMPLATES, tmp_path / "templates")
    monkeypatch.setattr(module, "TEMPLATES", tmp_path / "templates")
    for changed, same in (("_weight_norm_finish.j2", False), ("_macros.j2", False), ("lora_compose_tile.py.j2", True)):
        path = tmp_path / "templates" / changed
        original = path.read_text()
        path.write_text(original + "\n")
        template_digest.cache_clear()
        assert (template_digest("weight_norm", "fused") == before) is same, changed
        path.write_text(original)
    template_digest.cache_clear()


def test_a_template_digest_covers_the_constants_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_digest("dora_linear_forward", "split_k")
    template_digest.cache_clear()
    monkeypatch.setitem(find_variant("dora_linear_forward", "split_k").constants, "finish_n", 512)
    assert template_digest("dora_linear_forward", "split_k") != before
    template_digest.cache_clear()


@every_variant
def test_every_constant_of_a_variant_is_used_by_its_template(variant: Variant) -> None:
    text = "".join((TEMPLATES / name).read_text() for name in template_files(variant))
    assert [name for name in variant.constants if not re.search(rf"\b{name}\b", text)] == []


def test_an_unknown_variant_is_named_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"no variant 'tiel'; did you mean tile"):
        find_variant("lora_compose", "tiel")
