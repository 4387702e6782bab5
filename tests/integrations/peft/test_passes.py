"""A call of an accelerated model computes the norms of all its DoRA layers in one pass, however it is called; and no
layer ever sees a norm of other weights than its own at that moment."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.integrations.peft import passes, unchanged
from doratune.integrations.peft.passes import Begin, End
from doratune.nn import group, norm_cache, norm_pass
from doratune.nn.group_plan import Plan
from doratune.nn.norm import norm_and_gain_of
from doratune.nn.norm_cache import opened

from .peft_models import Pair, assert_same_gradients, inputs, llama, tokens, twin, with_dora

LAYERS = 2 * 7
"""DoRA layers of a llama of these tests."""


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many norms passes and the layers themselves have computed."""
    count: Counter[str] = Counter()

    def counting(where: str) -> Callable[..., object]:
        def compute(*arguments: object) -> object:
            count[where] += 1
            return norm_and_gain_of(*arguments)  # type: ignore[arg-type]

        return compute

    monkeypatch.setattr(norm_pass, "norm_and_gain_of", counting("pass"))
    monkeypatch.setattr(norm_cache, "norm_and_gain_of", counting("alone"))
    return count


def fast_llama(norm_reuse: str = "auto") -> PeftModel:
    torch.manual_seed(0)
    model = with_dora(llama())
    doratune.accelerate(model, quiet=True, norm_reuse=norm_reuse)
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def stock(model: PeftModel) -> PeftModel:
    """A copy with the same weights that PEFT runs."""
    copied = twin(model)
    doratune.restore(copied)
    return copied


def assert_as_stock(model: PeftModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), logits(stock(model), ids), rtol=1e-4, atol=1e-5)


def hooks(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(
            isinstance(hook, Begin | End)
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        )
    ]


def test_the_hooks_are_on_the_innermost_model_and_on_blocks() -> None:
    inner = "base_model.model.model"
    chain = [inner, f"{inner}.layers.0", f"{inner}.layers.1"]
    model = fast_llama()
    assert hooks(model) == chain
    doratune.accelerate(model, quiet=True)
    for name in chain:
        assert [type(hook) for hook in model.get_submodule(name)._forward_pre_hooks.values()].count(Begin) == 1
    doratune.restore(model)
    assert hooks(model) == []
    assert not any(module._forward_hooks_always_called for module in model.modules())


CALLS: dict[str, Callable[[PeftModel, torch.Tensor], object]] = {
    "the PEFT model": logits,
    "its LoraModel": lambda model, ids: logits(model.base_model, ids),
    "the language model": lambda model, ids: logits(model.get_base_model(), ids),
    "the inner model": lambda model, ids: model.get_base_model().model(input_ids=ids),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=[*CALLS])
def test_one_pass_serves_all_layers_whichever_module_is_called(
    call: Callable[[PeftModel, torch.Tensor], object], computed: Counter[str]
) -> None:
    model, ids = fast_llama(), tokens()
    for calls in (1, 2):
        call(model, ids)
        assert computed == {"pass": calls * LAYERS}
    assert opened() is None
    assert_as_stock(model, ids)


def test_a_pass_rounds_as_the_layers_do_where_a_trainer_wraps_the_forward_in_autocast(computed: Counter[str]) -> None:
    model = with_dora(llama().to(torch.bfloat16))  # fp32 adapters
    doratune.accelerate(model, quiet=True)
    forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = types.MethodType(forward, model)
    logits(model, tokens())
    assert computed == {"pass": LAYERS}


def test_generation_opens_a_pass_for_each_token(computed: Counter[str]) -> None:
    model, ids = fast_llama().eval(), tokens(5)
    ours = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert computed == {"pass": 3 * LAYERS}
    theirs = stock(model).generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)


def test_a_block_called_alone_opens_its_own_pass(computed: Counter[str]) -> None:
    model = fast_llama()
    block = model.get_base_model().model.layers[0]
    seen: list[Any] = []
    handle = block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    logits(model, tokens())
    handle.remove()
    computed.clear()
    block(*seen[0][0], **seen[0][1])
    assert computed == {"pass": 7}


def test_a_layer_called_alone_computes_its_norm(computed: Counter[str]) -> None:
    model = fast_llama()
    model.get_base_model().model.layers[0].self_attn.q_proj(torch.randn(3, 48))
    assert computed == {"alone": 1}


def _step(model: PeftModel, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    logits(model, ids).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _write_data(model: PeftModel, ids: torch.Tensor) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "q_proj.base" in name:
            parameter.data.mul_(1.5)  # PyTorch sees no such write


def _replace_data(model: PeftModel, ids: torch.Tensor) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def _load(model: PeftModel, ids: torch.Tensor) -> None:
    model.load_state_dict({name: 1.2 * value for name, value in model.state_dict().items()})


def _replace_parameters(model: PeftModel, ids: torch.Tensor) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.3, requires_grad=parameter.requires_grad))


CHANGES = {
    "a step": _step,
    "writes to .data": _write_data,
    "new .data": _replace_data,
    "load_state_dict": _load,
    "new parameters": _replace_parameters,
}


@pytest.mark.parametrize("norm_reuse", ["auto", "off", "tracked"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=[*CHANGES])
def test_the_next_forward_sees_every_write(change: Callable[[PeftModel, torch.Tensor], None], norm_reuse: str) -> None:
    if change is _write_data and norm_reuse == "tracked":
        pytest.skip("the policy is for users who make no such writes")
    model, ids = fast_llama(norm_reuse), tokens()
    logits(model, ids)
    for _ in range(2):
        change(model, ids)
        assert_as_stock(model, ids)


def test_a_write_in_the_middle_of_a_forward_is_seen(computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    second = model.get_base_model().model.layers[1]

    def double(module: nn.Module, args: object) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2.0)

    handle = second.register_forward_pre_hook(double)
    ours = logits(model, ids)
    handle.remove()
    assert computed["alone"] + computed["pass"] == LAYERS
    torch.testing.assert_close(ours, logits(stock(model), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recompute_of_a_block_reproduces_its_forwards_norms(reentrant: bool, computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    exact = stock(model)
    for each in (model, exact):
        each.train()
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for calls in (1, 2):
        logits(model, ids).square().sum().backward()
        assert computed == {"pass": calls * LAYERS}
        logits(exact, ids).square().sum().backward()
    assert_same_gradients(model, exact, 1e-4)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.q(x)


class _Checkpointed(nn.Module):
    """Calls its blocks by ``__call__`` in the recompute too, so that their hooks run there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("train", [True, False])
def test_layers_that_do_not_change_are_examined_once(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do a pass of the model and those of blocks take each other's examination for a change."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(_Checkpointed(), config).train(train)
    doratune.accelerate(model, quiet=True)
    examined: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            examined[f"{owner.__name__}.{name}"] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(passes._Layers, "_look")
    count(unchanged.Unchanged, "__init__")
    for step in range(7):
        before = examined.copy()
        with torch.set_grad_enabled(train):
            y = model(torch.randn(4, 8))
        if train:
            y.square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        assert step < 3 or examined == before, step
    assert examined["_Layers._look"]
    model.base_model.model.blocks[1].q.set_scale("default", 2.0)
    before = examined.copy()
    for _ in range(3):
        model(torch.randn(4, 8))
    assert examined["Unchanged.__init__"] == before["Unchanged.__init__"] + 1, "the one that has changed"


def test_a_write_before_the_backward_does_not_reach_a_recompute(
    computed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has used the old norms, and its recompute must, whatever PyTorch has not seen."""
    model, ids = fast_llama(), tokens()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    seen: list[torch.Tensor] = []
    factors_of = group._factors

    def factors(rows: torch.Tensor, plan: Plan, *, trains: bool) -> Any:
        made = factors_of(rows, plan, trains=trains)
        *_, g = made
        seen.extend(g[:1] if plan.caches[0] is q.lora_variant["default"].norms else [])
        return made

    monkeypatch.setattr(group, "_factors", factors)
    loss = logits(model, ids).square().sum()
    q.lora_magnitude_vector["default"].weight.data.mul_(2.0)
    loss.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_micro_batches_in_flight_are_recomputed_from_the_weights(computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    exact = stock(model)
    for each in (model, exact):
        each.train()
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [logits(each, batch).square().sum() for batch in (ids, ids.flip(0))]
        for loss in losses:
            loss.backward()
    assert computed["pass"] >= 2 * LAYERS
    assert computed["pass"] + computed["alone"] == 4 * LAYERS
    assert_same_gradients(model, exact, 1e-4)


def test_adapters_that_do_not_run_are_left_out(computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    with model.disable_adapter():
        logits(model, ids)
    assert not computed
    model.get_base_model().model.layers[0].self_attn.q_proj.merge()
    logits(model, ids)
    assert computed == {"pass": LAYERS - 1}
    model.get_base_model().model.layers[0].self_attn.q_proj.unmerge()
    computed.clear()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for adapter in ("other", "default", "other"):
        model.set_adapter(adapter)
        assert_as_stock(model, ids)
    assert computed == {"pass": 3 * LAYERS}


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_have_passes_of_their_own(copied: Callable[[PeftModel], PeftModel], computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    before = logits(model, ids)
    other = copied(model)
    assert hooks(other) == hooks(model)
    _write_data(other, ids)
    computed.clear()
    assert_as_stock(other, ids)
    assert torch.equal(logits(model, ids), before)
    assert computed == {"pass": 2 * LAYERS}


def _saved(model: PeftModel) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_copied_block_brings_no_other_with_it() -> None:
    model = fast_llama()
    logits(model, tokens())
    block = copy.deepcopy(model.get_base_model().model.layers[0])
    assert len(pickle.dumps(block)) < 1.2 * sum(p.nbytes for p in block.parameters()) + 200_000


def test_an_error_in_the_middle_closes_the_pass() -> None:
    model, ids = fast_llama(), tokens()
    second = model.get_base_model().model.layers[1]

    def fail(module: nn.Module, args: object) -> None:
        raise KeyError("in the middle")

    handle = second.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        logits(model, ids)
    assert opened() is None
    handle.remove()
    _write_data(model, ids)
    assert_as_stock(model, ids)


def test_a_model_without_blocks_has_a_pass_too(computed: Counter[str]) -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    assert hooks(model) == ["base_model.model"]
    x = inputs()
    torch.testing.assert_close(model(x), stock(model)(x), rtol=1e-4, atol=1e-5)
    assert computed == {"pass": 2}


def test_a_model_called_within_another_opens_its_own(computed: Counter[str]) -> None:
    teacher, student, ids = fast_llama(), fast_llama(), tokens()
    seen: list[torch.Tensor] = []
    handle = student.get_base_model().model.register_forward_pre_hook(lambda *_: seen.append(logits(teacher, ids)))
    logits(student, ids)
    handle.remove()
    assert computed == {"pass": 2 * LAYERS}
    torch.testing.assert_close(seen[0], logits(stock(teacher), ids), rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_keep_computing_alone(computed: Counter[str]) -> None:
    model, ids = fast_llama(), tokens()
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    q.base_layer.register_forward_pre_hook(lambda module, args: None)
    assert_as_stock(model, ids)
    assert computed["pass"] == LAYERS - 1


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_without_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = fast_llama(), tokens()
    exact = logits(model, ids)
    monkeypatch.setattr(norm_pass.NormPass, "open", lambda self: pytest.fail("a pass was opened"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, exact, rtol=1e-4, atol=1e-5)
