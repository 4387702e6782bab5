"""A call of a model on quantised layers computes all their norms in one pass, from codes and scales; whatever happens
to weights, adapters and layers, every layer divides by the norm of what it holds at that moment.

The norm that each layer uses is compared, in its call, with the fp64 norm of the W that its package decodes then.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import doratune
from doratune.integrations.peft import passes, stored
from doratune.integrations.peft.base_layers import BNB_4BIT, BNB_8BIT, HQQ, TORCHAO
from doratune.integrations.peft.stored_place import StoredPlace
from doratune.integrations.peft.variant import DoraVariant
from doratune.nn import stored_group
from doratune.nn.norm import NormAndGain

from .peft_models import (
    VOCABULARY,
    assert_same_gradients,
    four_bits,
    in_four_bits,
    read_no_storage,
    relative,
    shake,
    tokens,
    twin,
    with_dora,
)
from .test_quantised import quantised

LAYERS = 2 * 7
SHAPES = 4
"""Of layers: q and o, k and v, gate and up, down."""


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many norms of quantised layers came from a pass, and how many from the layers; each one is checked."""
    count: Counter[str] = Counter()
    norm_of, compute, of_plan = DoraVariant.norm_of, DoraVariant._compute_norm, stored_group._norms_and_gains
    alone: Counter[str] = Counter()

    def computed(self: Any, *arguments: Any) -> Any:
        alone["layers"] += 1
        return compute(self, *arguments)

    def asked_by_calls(plan: Any, how: Any, *, trains: bool) -> Any:
        before = alone["layers"]
        norms, gains = of_plan(plan, how, trains=trains)
        assert len(gains) == plan.count
        assert len(norms) in ((plan.count,) if trains else (0, plan.count))
        for index, one in enumerate(plan.projections):
            check(norms[index] if norms else None, gains[index], one.base, *one.layer[1:5])
        by_layers = alone["layers"] - before
        count.update(["alone"] * by_layers + ["pass"] * (plan.count - by_layers))
        return norms, gains

    def asked(self: Any, module: Any, adapter: str, dora: Any) -> Any:
        given = norm_of(self, module, adapter, dora)
        if dora.base.matrix is None:
            norm, g = given if isinstance(given, NormAndGain) else (given, None)
            check(norm, g, dora.layer, *dora[:4])
            count["alone" if g is None else "pass"] += 1
        return given

    def check(norm: Any, g: Any, base: Any, a: Any, b: Any, m: Any, scaling: float) -> None:
        exact = (w_of(base).double() + scaling * b.double() @ a.double()).norm(dim=1)
        assert norm is None or relative(norm, exact) < 2e-6
        assert g is None or relative(g, m / exact) < 2e-6

    monkeypatch.setattr(DoraVariant, "norm_of", asked)
    monkeypatch.setattr(DoraVariant, "_compute_norm", computed)
    monkeypatch.setattr(stored_group, "_norms_and_gains", asked_by_calls)
    return count


def w_of(layer: Any) -> torch.Tensor:
    """W as the layer's package decodes it; PEFT's dequantising puts a new weight into a layer on the CPU."""
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()  # type: ignore[no-any-return]
    if type(layer).__name__ == "Linear8bitLt":
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * scales.view(-1, 1) / 127.0  # type: ignore[no-any-return]
    with torch.no_grad():
        return dequantize_module_weight(layer).detach().float()


def fast_pair(kind: str = BNB_4BIT, **settings: Any) -> Any:
    model = with_dora(quantised(kind, sizes=(64, 128, 64)), **settings)
    for name in ("first", "second"):
        base = model.get_base_model().get_submodule(name).base_layer
        base.support_avx512bf16_for_cpu = False  # on a GPU W is not packed anew in inference
        if kind == HQQ and base.bias is not None:
            base.bias.detach_().requires_grad_(False)  # in later versions no parameter, which PEFT would have frozen
    doratune.accelerate(model, quiet=True, precompile=False)
    return model


def llama(quantise: Callable[[str], bool] = lambda name: True, layers: int = 2) -> PeftModel:
    """A llama whose layers in the blocks are 4-bit where ``quantise`` says so, with DoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config)
    in_four_bits(model, quantise)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = with_dora(model, target_modules=targets)
    doratune.accelerate(made, quiet=True, precompile=False)
    return made


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids).logits
    return result


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [BNB_4BIT, BNB_8BIT, HQQ, TORCHAO])
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_every_layer_takes_its_norm_from_the_pass(kind: str, train: bool, used: Counter[str]) -> None:
    model = fast_pair(kind, lora_dropout=0.2 if train else 0.0).train(train)
    for calls in (1, 2, 3):
        with torch.set_grad_enabled(train):
            y = model(X)
        if train:
            y.sum().backward()
        assert used == {"pass": 2 * calls}


@pytest.mark.parametrize("alone", [False, True])
def test_what_hqq_makes_in_inference_mode_is_read_anew_in_every_pass(alone: bool, used: Counter[str]) -> None:
    """Such tensors count no writes, and can be written to in that mode alone. ``used`` checks every norm."""
    model = fast_pair(HQQ).eval()
    layer = second_of(model)
    zeros = layer.base_layer.meta["zero"]
    assert zeros.is_inference()
    for _ in range(2):
        with torch.no_grad():
            layer(torch.randn(2, 128)) if alone else model(X)
        with torch.inference_mode():
            zeros.mul_(1.5)
    assert used == ({"alone": 2} if alone else {"pass": 4})


def test_layers_of_one_shape_are_one_launch(used: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from doratune.nn import norm_pass

    launches: list[int] = []
    values = norm_pass._Group._values

    def counted(self: Any, found: Any, how: Any) -> Any:
        launches.append(len(found.members))
        return values(self, found, how)

    monkeypatch.setattr(norm_pass._Group, "_values", counted)
    model = llama()
    for _ in range(2):
        logits(model, tokens())
    assert used == {"pass": 2 * LAYERS}
    assert sorted(launches[:SHAPES]) == [2, 4, 4, 4]
    assert len(launches) == 2 * SHAPES


def second_of(model: Any) -> Any:
    return model.get_base_model().second


def write_codes(model: Any) -> None:
    weight = second_of(model).base_layer.weight
    weight.copy_(weight.flip(0))


def write_scales(model: Any) -> None:
    second_of(model).base_layer.weight.quant_state.absmax.mul_(1.5)


def replace_scales(model: Any) -> None:
    state = second_of(model).base_layer.weight.quant_state
    state.absmax = state.absmax * 1.5


def new_data(model: Any) -> None:
    weight = second_of(model).base_layer.weight
    weight.data = weight.data.flip(0)


def move(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def quantise_anew(model: Any) -> None:
    base = second_of(model).base_layer
    base.weight = four_bits(nn.Linear(base.in_features, base.out_features, bias=False)).weight


def another_base(model: Any) -> None:
    second = second_of(model)
    second.base_layer = four_bits(nn.Linear(second.in_features, second.out_features, bias=False))


def step(model: Any) -> None:
    with torch.enable_grad():
        model(X).square().sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    model.zero_grad()


def write_unseen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5)


def new_adapters(model: Any) -> None:
    for part in ("lora_A", "lora_B"):
        linear = getattr(second_of(model), part)["default"]
        linear.weight = nn.Parameter(linear.weight.detach() * 1.3)


def another_rank(model: Any) -> None:
    second = second_of(model)
    second.lora_A["default"].weight = nn.Parameter(torch.randn(3, second.in_features))
    second.lora_B["default"].weight = nn.Parameter(torch.randn(second.out_features, 3))


def rescale(model: Any) -> None:
    second_of(model).set_scale("default", 3.0)


def magnitudes(model: Any) -> None:
    second_of(model).lora_magnitude_vector["default"].weight.mul_(2.0)


def switch(model: Any) -> None:
    if "other" not in model.peft_config:
        settings = {"target_modules": ["first", "second"], "init_lora_weights": False}
        model.add_adapter("other", peft.LoraConfig(use_dora=True, r=3, **settings))
        shake(model, 1)
    model.set_adapter("other" if model.active_adapter == "default" else "default")


def switch_one(model: Any) -> None:
    switch(model)
    model.set_adapter("default")
    second_of(model).set_adapter("other")


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model(X)
    model.unmerge_adapter()


def disable(model: Any) -> None:
    with model.disable_adapter():
        model(X)


CHANGES = [
    write_codes, write_scales, replace_scales, new_data, move, quantise_anew, another_base, step, write_unseen,
    new_adapters, another_rank, rescale, magnitudes, switch, switch_one, merge_and_unmerge, disable,
]  # fmt: skip


@pytest.mark.parametrize("norm_reuse", ["auto", "tracked"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_the_next_forward_sees_every_change(change: Callable[[Any], None], norm_reuse: str, used: Counter[str]) -> None:
    if change is write_unseen and norm_reuse == "tracked":
        pytest.skip("the policy is for users who make no such writes")
    model = fast_pair()
    doratune.accelerate(model, quiet=True, precompile=False, norm_reuse=norm_reuse)
    model(X)
    for _ in range(2):
        with torch.no_grad():
            change(model)
        for _ in range(3):
            model(X)  # the norms are checked
        before = Counter(used)
        model(X)
        assert used - before == {"pass": 2}, "and soon all of them come from passes again"


def test_a_merged_or_disabled_model_computes_no_norms(used: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast_pair()
    model(X)
    computed = []
    monkeypatch.setattr("doratune.nn.norm_pass.norm_and_gain_of_stored", lambda *_: computed.append(1))
    with model.disable_adapter():
        model(X)
    model.merge_adapter()
    model(X)
    assert computed == []
    assert used == {"pass": 2}


class Between(nn.Module):
    """Runs ``act`` on the model between its two layers, without a hook that a pass would notice."""

    def __init__(self, pair: Any) -> None:
        super().__init__()
        self.first, self.second = pair.first, pair.second
        self.act: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        self.act()
        result: torch.Tensor = self.second(y)
        return result


@pytest.mark.parametrize("change", [each for each in CHANGES if each is not step], ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_a_change_in_the_middle_of_a_forward_is_seen(change: Callable[[Any], None], used: Counter[str]) -> None:
    if change is write_unseen:
        pytest.skip("of what PyTorch has not seen the next forward pass takes notice")
    if change in (merge_and_unmerge, disable):
        pytest.skip("these call the model")
    model: Any = fast_pair()
    inner = model.base_model.model = Between(model.base_model.model)
    doratune.accelerate(model, quiet=True, precompile=False)
    model(X)

    def act() -> None:
        inner.act = lambda: None
        with torch.no_grad():
            change(model)

    inner.act = act
    model(X)
    assert used["alone"] <= 1
    for _ in range(3):
        model(X)
    before = Counter(used)
    model(X)
    assert used - before == {"pass": 2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recompute_of_a_checkpoint_takes_its_forwards_norms(reentrant: bool, used: Counter[str]) -> None:
    model, ids = llama(), tokens()
    exact = twin(model)
    doratune.restore(exact)
    for each in (model, exact):
        each.train()
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for calls in (1, 2):
        logits(model, ids).square().sum().backward()
        assert used == {"pass": calls * 2 * LAYERS}, "forward and recompute"
        logits(exact, ids).square().sum().backward()
    assert_same_gradients(model, exact, 1e-4)


def test_a_layer_or_block_called_alone_has_its_own_norms(used: Counter[str]) -> None:
    model = llama()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    logits(model, tokens())
    before = Counter(used)
    layer(torch.randn(3, 128))
    assert used - before == {"alone": 1}
    block = model.get_base_model().model.layers[1]
    x = torch.randn(1, 3, 64)
    rotary = model.get_base_model().model.rotary_emb(x, torch.arange(3)[None])
    before = Counter(used)
    block(x, position_embeddings=rotary)
    assert used - before == {"pass": 7}


def test_a_mixed_model_has_one_pass_over_all_that_can_be_read(
    used: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stored.StorageReader.read

    def unknown(self: Any, *rest: Any) -> Any:
        return "a format that nobody knows" if "layers.1.mlp.down_proj" in self._layer else read(self, *rest)

    monkeypatch.setattr(stored.StorageReader, "read", unknown)
    model, ids = llama(lambda name: "v_proj" not in name and "layers.0.mlp" not in name), tokens()
    exact = twin(model)
    doratune.restore(exact)
    wanted = logits(exact, ids)
    looks: list[int] = []
    look = passes._Layers._look

    def looked(self: Any) -> Any:
        found = look(self)
        looks.append(len(found.over))
        return found

    monkeypatch.setattr(passes._Layers, "_look", looked)
    quantised_layers = LAYERS - 2 - 3
    for calls in range(1, 6):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
        assert used == {"pass": calls * (quantised_layers - 1), "alone": calls}
    assert looks == [LAYERS - 1] * len(looks), "all but the one of an unknown format"
    assert len(looks) <= 2, "and they are not examined in every call"


def test_layers_that_no_pass_reads_are_not_examined_in_every_call(
    used: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = passes._Layers._look
    monkeypatch.setattr(passes._Layers, "_look", lambda self: (looks.append(1), look(self))[1])
    hooked, unknown = fast_pair(), fast_pair()
    for name in ("first", "second"):
        hooked.get_base_model().get_submodule(name).base_layer.register_forward_pre_hook(lambda module, args: None)
    for model in (hooked, unknown):
        if model is unknown:
            read_no_storage(monkeypatch)
        for _ in range(4):
            model(X)
    assert used == {"alone": 2 * 2 * 4}
    assert len(looks) <= 2 * 2


def test_a_deleted_layer_is_no_more_in_the_pass(used: Counter[str]) -> None:
    model: Any = fast_pair()
    model(X)
    model.base_model.model.second = nn.Identity()
    before = Counter(used)
    for _ in range(2):
        model(X)
    assert used - before == {"pass": 2}, "one layer, twice"
    model.delete_adapter("default")


def test_a_pass_does_not_keep_the_memory_of_a_w_that_its_layer_has_given_up() -> None:
    model = fast_pair()
    model(X)
    base = second_of(model).base_layer
    memory = weakref.ref(base.weight.untyped_storage())
    quantise_anew(model)
    gc.collect()
    assert memory() is None
    model(X)
    memory = weakref.ref(base.weight.untyped_storage())
    new_data(model)  # seen in the next call
    model(X)
    gc.collect()
    assert memory() is None
    memory = weakref.ref(base.weight.untyped_storage())
    doratune.restore(model)
    quantise_anew(model)
    gc.collect()
    assert memory() is None


def test_a_layer_with_hooks_on_its_base_keeps_computing_alone(used: Counter[str]) -> None:
    model = fast_pair()
    second_of(model).base_layer.register_forward_pre_hook(lambda module, args: None)
    for _ in range(2):
        model(X)
    assert used == {"pass": 2, "alone": 2}


def test_a_layer_that_does_not_run_is_left_out(used: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Any] = []
    original = passes.NormPass.open.__globals__["norm_and_gain_of_stored"]
    monkeypatch.setattr(
        "doratune.nn.norm_pass.norm_and_gain_of_stored", lambda *given: (computed.append(1), original(*given))[1]
    )
    model: Any = fast_pair()
    model.base_model.model.forward = lambda x: model.base_model.model.first(x)
    for _ in range(4):
        model(X)
    assert len(computed) == 2 + 2 + 1 + 1
    assert used == {"pass": 4}


def test_copies_have_passes_of_their_own(used: Counter[str]) -> None:
    model = fast_pair()
    model(X)
    other = copy.deepcopy(model)
    with torch.no_grad():
        second_of(other).base_layer.weight.copy_(second_of(other).base_layer.weight.flip(0))
    for each in (other, model, other):
        each(X)
    assert used["alone"] == 0


def test_the_places_of_dense_layers_are_not_examined_as_quantised_ones() -> None:
    model = llama(lambda name: "mlp" in name)
    found = [type(place) for place, _ in passes._Layers(model.get_base_model().model).layers]
    assert found.count(StoredPlace) == 6
    assert len(found) == LAYERS


def test_the_report_says_how_many_layers_get_their_norms_together() -> None:
    for quantise, groups in ((lambda name: True, [2, 4, 4, 4]), (lambda name: "mlp" in name, [2, 4, 4, 4])):
        model = llama(quantise)
        report = doratune.accelerate(model, quiet=True, precompile=False)
        assert sorted(report.norms_together) == groups
        assert "The norms of 14 layers are computed together at the start of a call, in 4 groups" in str(report)
    alone = doratune.accelerate(fast_pair(), quiet=True, norm_reuse="off")
    assert alone.norms_together == ()
    assert "together" not in str(alone)
