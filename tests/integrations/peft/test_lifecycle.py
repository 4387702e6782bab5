"""PEFT's features work on an accelerated model: merging, saving, copies, adapters. Also the report and the errors."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

import doratune
from doratune.integrations.peft import PeftVersionError
from doratune.integrations.peft.variant import DoraVariant
from doratune.nn.norm_cache import NormReuseError
from doratune.runtime.arguments import ArgumentError

from .peft_models import (
    Pair,
    assert_same_gradients,
    gradients,
    inputs,
    llama,
    relative,
    shake,
    tokens,
    twin,
    variants,
    with_dora,
)

pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


# ---- what PEFT does with a model -----------------------------------------------------------------------------------


def test_merge_unmerge_disable_and_switching_are_pefts() -> None:
    stock = with_dora(Pair())
    settings = {"target_modules": ["first", "second"], "init_lora_weights": False}
    stock.add_adapter("other", peft.LoraConfig(use_dora=True, r=3, **settings))
    shake(stock, 1)
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x = inputs()

    def same(bound: float = 1e-6) -> None:
        assert relative(fast(x), stock(x)) < bound

    same()
    for act in (
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("other"),
        lambda model: model.delete_adapter("default"),
    ):
        act(fast), act(stock)
        same()
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fast(x), stock(x))
    same()
    assert torch.equal(fast.merge_and_unload()(x), stock.merge_and_unload()(x))


def test_saving_and_loading_round_trip(tmp_path: Path) -> None:
    model = with_dora(llama())
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items() if "lora" not in name}
    stock_keys = list(model.state_dict())
    doratune.accelerate(model, quiet=True)
    assert list(model.state_dict()) == stock_keys
    model.save_pretrained(tmp_path)
    fresh = llama()
    fresh.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in base.items()})
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    ids = tokens()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    doratune.accelerate(loaded, quiet=True)
    # From its second pass on a model runs its layers in groups, which adds up in another order.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save", "pickle"])
def test_copies_of_an_accelerated_model_are_accelerated_and_on_their_own(copied: str) -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, norm_reuse="tracked", quiet=True)
    x = inputs()
    y = model(x)
    if copied == "deepcopy":
        other = twin(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert all(type(variant) is DoraVariant and variant.norms.reuse == "tracked" for variant in variants(other))
    assert not {id(variant) for variant in variants(other)} & {id(variant) for variant in variants(model)}
    assert torch.equal(other(x), y)
    shake(other, 5)
    assert torch.equal(model(x), y)
    doratune.restore(other)
    doratune.restore(model)
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(other(x), y)


def test_mixed_batches_are_refused_by_peft_as_before() -> None:
    model = with_dora(llama())
    doratune.accelerate(model, quiet=True)
    model.eval()
    with pytest.raises(ValueError, match="DoRA"):
        model(tokens(), adapter_names=["default", "__base__"])


def test_pefts_own_norm_caching_is_honoured() -> None:
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip(f"PEFT {peft.__version__} has no DoraCaching")
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    model.eval()
    x = inputs()
    y = model(x)
    caches = [module._dora_cache for module in model.modules() if hasattr(module, "_dora_cache")]
    with helpers.DoraCaching():
        torch.testing.assert_close(model(x), y)
        assert all(cache for cache in caches)
        torch.testing.assert_close(model(x), y)
    model(x)
    assert not any(cache for cache in caches)


@pytest.mark.slow
def test_an_accelerated_model_compiles_to_one_graph() -> None:
    for dropout in (0.0, 0.4):
        model = with_dora(Pair(), lora_dropout=dropout)
        doratune.accelerate(model, quiet=True)
        model.eval()
        x = inputs()
        eager = model(x)
        eager.square().sum().backward()
        wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        compiled.square().sum().backward()
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradients(model), wanted)
        torch.compile(model.train(), fullgraph=True, backend="aot_eager")(x).sum().backward()


# ---- accelerate, restore and the report ----------------------------------------------------------------------------


def test_accelerate_is_undone_by_restore_and_can_be_repeated() -> None:
    model = with_dora(Pair())
    x = inputs()
    stock, keys = model(x), [set(vars(module)) for module in model.modules()]
    first = doratune.accelerate(model, quiet=True)
    assert doratune.accelerate(model, quiet=True) == first
    assert all(isinstance(variant, DoraVariant) for variant in variants(model))
    doratune.restore(model)
    assert all(type(variant) is DoraLinearVariant for variant in variants(model))
    assert [set(vars(module)) for module in model.modules()] == keys
    assert torch.equal(model(x), stock)


def test_the_report_names_every_layer_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.linear = nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))

    config = peft.LoraConfig(target_modules=["embed", "conv", "linear"], use_dora=True, init_lora_weights=False, r=4)
    model = peft.get_peft_model(Mixed(), config)
    ids = torch.randint(0, 10, (2, 5))
    stock = model(ids)
    report = doratune.accelerate(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert {(layer.name.rsplit(".", 1)[1], layer.base, layer.runs) for layer in report.layers} == {
        ("embed", "Embedding", "peft"),
        ("conv", "Conv1d", "peft"),
        ("linear", "Linear", "reference"),
    }
    assert "1 of 3 DoRA layers" in str(report)
    torch.testing.assert_close(model(ids), stock)


def test_layers_that_differ_in_a_number_share_a_line_of_the_report() -> None:
    report = doratune.accelerate(with_dora(llama(layers=3)), quiet=True)
    assert len(report.layers) == 21
    assert "   3 × base_model.model.model.layers.*.mlp.up_proj" in str(report)


def test_a_model_without_dora_is_left_alone_and_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = peft.get_peft_model(Pair(), peft.LoraConfig(target_modules=["first"]))
    assert not doratune.accelerate(model).layers
    assert "no DoRA layer" in capsys.readouterr().out


def test_a_bias_on_the_adapter_is_left_to_peft() -> None:
    model = with_dora(Pair())
    for name in ("first", "second"):  # PEFT refuses lora_bias=True with DoRA, when it makes the adapter
        lora_b = getattr(model.base_model.model, name).lora_B["default"]
        lora_b.bias = nn.Parameter(torch.ones(lora_b.out_features))
    report = doratune.accelerate(model, quiet=True)
    assert not report.accelerated
    assert "lora_bias" in report.left[0].remark


def test_weights_may_be_loaded_after_accelerating() -> None:
    model = with_dora(Pair())
    weights = model.state_dict()
    with torch.device("meta"):
        empty = peft.get_peft_model(
            Pair(), peft.LoraConfig(target_modules=["first", "second"], use_dora=True), low_cpu_mem_usage=True
        )
    report = doratune.accelerate(empty, quiet=True)
    assert {layer.runs for layer in report.layers} == {"pending"}
    empty.load_state_dict(weights, assign=True)
    x = inputs()
    y = empty(x)
    torch.testing.assert_close(y, model(x))
    assert {layer.runs for layer in doratune.accelerate(empty, quiet=True).layers} == {"reference"}


def test_hooks_are_respected() -> None:
    stock = with_dora(Pair())
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    for model in (stock, fast):  # a base layer that is more than its W
        model.base_model.model.first.base_layer.register_forward_hook(lambda _, args, out: out * args[0].sum())
    x = inputs()
    for model in (stock, fast):
        model(x).square().sum().backward()
    assert_same_gradients(fast, stock, 1e-5)

    seen: list[torch.Tensor] = []
    fast.base_model.model.second.lora_A["default"].register_forward_hook(lambda *args: seen.append(args[2]))
    with pytest.warns(UserWarning, match=r"doratune leaves .*second \(adapter default\).*hooks"):
        y = fast(x)
    assert seen
    assert torch.allclose(y, stock(x), rtol=1e-5)
    assert not doratune.accelerate(fast, quiet=True).layers[1].kernels
    assert "hooks" in doratune.accelerate(fast, quiet=True).left[0].remark


def test_torch_func_runs_pefts_code() -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    x = inputs()
    with pytest.warns(UserWarning, match=r"torch.func"):
        found = torch.func.grad(loss)(parameters, x)
    model(x).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert relative(found[name], gradient) < 1e-5


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.16.0", "0.22.0", "1.0.0", "unknown"])
def test_untested_versions_of_peft_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    model = with_dora(Pair())
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(PeftVersionError, match=rf"expected PEFT 0\.17 to 0\.21, found {version}"):
        doratune.accelerate(model)
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_wrong_model_and_an_unknown_policy_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got dict"):
        doratune.accelerate({})  # type: ignore[arg-type]
    model = with_dora(Pair())
    with pytest.raises(NormReuseError, match=r"norm_reuse must be one of auto, tracked, off, got 'always'"):
        doratune.accelerate(model, norm_reuse="always")
    assert all(type(variant) is DoraLinearVariant for variant in variants(model))
