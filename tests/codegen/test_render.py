"""Emitted text is specialised: no masks where the shape divides, no bias code without bias, widths written out; and it
changes only when someone means it to (goldens)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import VARIANTS, Variant, find_variant

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
H200 = find_gpu("h200")
EVEN = {"d_out": 4096, "d_in": 4096, "rank": 384, "tokens": 4096, "dtype": "bf16", "adapter": "bf16", "gpu": "h200"}
RAGGED = {**EVEN, "d_out": 4304, "d_in": 1152, "rank": 24}


def text_of(variant: Variant, values: dict[str, object], **flags: object) -> str:
    spec = KernelSpec.create(variant.op, **{**values, **flags})
    return render(spec, variant.seeds(spec, H200)[0]).text


def biased(variant: Variant) -> dict[str, bool]:
    return {"bias": True} if "bias" in OPS[variant.op].flags else {}


def golden_cases() -> dict[str, tuple[Variant, dict[str, object]]]:
    """One plain even-shaped and one ragged, flag-rich text for each variant."""
    cases: dict[str, tuple[Variant, dict[str, object]]] = {}
    for variant in VARIANTS:
        rich: dict[str, object] = {
            "weight_norm": {"magnitude": "fp32", "save": True},
            "weight_norm_exact": {"magnitude": "fp32"},
        }.get(variant.op, biased(variant))
        cases[f"{variant.op}_{variant.name}"] = (variant, EVEN)
        cases[f"{variant.op}_{variant.name}_ragged"] = (variant, {**RAGGED, **rich})
        if variant.descriptors:  # where fp32 adapters take a kernel of their own
            exact = {**EVEN, "adapter": "fp32"}
            if variant.unavailable(KernelSpec.create(variant.op, **exact), H200) is None:
                cases[f"{variant.op}_{variant.name}_fp32_adapters"] = (variant, exact)
            if "autocast" in OPS[variant.op].flags:
                rounded = {**RAGGED, "adapter": "fp32", "autocast": True}
                cases[f"{variant.op}_{variant.name}_autocast"] = (variant, rounded)
        if variant.library:  # where a setting of PyTorch's could cost the library digits
            cases[f"{variant.op}_{variant.name}_fp32"] = (variant, {**EVEN, "dtype": "fp32", "adapter": "fp32"})
            mixed = {**RAGGED, **rich, "dtype": "fp16", "adapter": "fp32"}
            cases[f"{variant.op}_{variant.name}_fp16_fp32_adapters"] = (variant, mixed)
    return cases


@pytest.mark.parametrize("name", golden_cases())
def test_emitted_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    variant, values = golden_cases()[name]
    text, golden = text_of(variant, values), GOLDENS / f"{name}.py"
    if request.config.getoption("--update-goldens"):
        golden.write_text(text)
    assert golden.read_text() == text, (
        "if the change is meant, run pytest tests/codegen/test_render.py --update-goldens"
    )


def test_there_is_no_golden_without_a_case() -> None:
    assert {path.stem for path in GOLDENS.glob("*.py")} == set(golden_cases())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.op}-{v.name}")
def test_where_the_shape_divides_only_the_token_edge_is_masked(variant: Variant) -> None:
    text = text_of(variant, EVEN)
    masked = [line for line in text.splitlines() if "mask=" in line]
    assert all(
        any(edge in line for edge in ("in_t", "< chunks", "mask=needed", "tiny", "counters <")) for line in masked
    ), masked
    assert any("mask=" in line for line in text_of(variant, RAGGED).splitlines())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if biased(v)], ids=lambda v: f"{v.op}-{v.name}")
def test_without_bias_there_is_no_trace_of_it(variant: Variant) -> None:
    assert "bias" not in text_of(variant, EVEN).replace("db = sum_t dY", "").split('"""', 2)[2]
    assert "bias_ptr" in text_of(variant, EVEN, bias=True) or "dbias" in text_of(variant, EVEN, bias=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.op}-{v.name}")
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
        spec = KernelSpec.create(variant.op, **values)
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


def test_an_unknown_variant_is_named_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"no variant 'tiel'; did you mean tile"):
        find_variant("lora_compose", "tiel")
