"""A cached norm is never stale: after every kind of change of W, A or B the layer divides by their present norm. The
recompute of a checkpointed layer reuses the norm of its forward pass.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.internals.torch import knows_backward
from doratune.nn import norm_cache
from doratune.nn.norm_cache import NormCache, NormReuseError

D_OUT, D_IN, RANK = 24, 16, 4
Change = Callable[[doratune.nn.DoRALinear], None]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by every norm that a cache computes."""
    norms: list[torch.Tensor] = []
    norm_of, norm_and_gain_of = norm_cache.norm_of, norm_cache.norm_and_gain_of

    def spy(*args: object) -> torch.Tensor:
        norms.append(norm_of(*args))  # type: ignore[arg-type]
        return norms[-1]

    def spy_both(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        norm, g = norm_and_gain_of(*args)  # type: ignore[arg-type]
        norms.append(norm)
        return norm, g

    monkeypatch.setattr(norm_cache, "norm_of", spy)
    monkeypatch.setattr(norm_cache, "norm_and_gain_of", spy_both)
    return norms


def make_module(reuse: str = "auto", *, bias: bool = False) -> doratune.nn.DoRALinear:
    torch.manual_seed(0)
    module = doratune.nn.DoRALinear(D_IN, D_OUT, RANK, 3.0, bias=bias, norm_reuse=reuse)
    with torch.no_grad():
        module.adapter[1].normal_()
    return module


def by_the_book(module: doratune.nn.DoRALinear, x: torch.Tensor) -> torch.Tensor:
    lora_a, lora_b, magnitude = module.adapter
    weight = module.base_layer.weight
    adapted = weight + module.scaling * lora_b @ lora_a
    return x @ (magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T


def step(make: Callable[..., torch.optim.Optimizer], **options: object) -> Change:
    def change(module: doratune.nn.DoRALinear) -> None:
        lora_a, lora_b, _ = module.adapter
        optimizer = make([lora_a, lora_b], lr=0.1, **options)
        lora_a.grad, lora_b.grad = torch.randn_like(lora_a), torch.randn_like(lora_b)
        optimizer.step()

    return change


class BehindTheBack(torch.optim.Optimizer):
    """Writes like a kernel with raw pointers, without a change of the version."""

    def __init__(self, parameters: list[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


def load(module: doratune.nn.DoRALinear) -> None:
    module.load_state_dict({name: value + 0.1 for name, value in module.state_dict().items()})


def load_by_assignment(module: doratune.nn.DoRALinear) -> None:
    module.load_state_dict({name: value + 0.1 for name, value in module.state_dict().items()}, assign=True)


@torch.no_grad()
def copy_in_place(module: doratune.nn.DoRALinear) -> None:
    module.adapter[0].copy_(torch.randn(RANK, D_IN))


def assign_data(module: doratune.nn.DoRALinear) -> None:
    module.adapter[1].data = torch.randn(D_OUT, RANK)


def new_parameter(module: doratune.nn.DoRALinear) -> None:
    module.lora_B["default"].weight = nn.Parameter(torch.randn(D_OUT, RANK))  # type: ignore[index]


def merge_and_unmerge(module: doratune.nn.DoRALinear) -> None:
    module.merge()
    with torch.no_grad():
        module.adapter[1].mul_(2.0)
    module.unmerge()


def other_weight(module: doratune.nn.DoRALinear) -> None:
    module.base_layer.load_state_dict({"weight": torch.randn(D_OUT, D_IN)})


def other_scaling(module: doratune.nn.DoRALinear) -> None:
    module.scaling *= 2.0


def there_and_back(module: doratune.nn.DoRALinear) -> None:
    module.to(torch.float64)
    with torch.no_grad():
        module.adapter[1].mul_(2.0)
    module.to(torch.float32)


def freed_and_taken_again(module: doratune.nn.DoRALinear) -> None:
    """New values, which the allocator may put at the address of the old ones."""
    lora_b = module.adapter[1]
    values = lora_b.detach() * 2.0
    lora_b.data = torch.empty(0)
    lora_b.data = values.clone()


def data_in_place(module: doratune.nn.DoRALinear) -> None:
    module.adapter[1].data.mul_(2.0)


def weight_data_in_place(module: doratune.nn.DoRALinear) -> None:
    module.base_layer.weight.data.mul_(2.0)


def through_a_pointer(module: doratune.nn.DoRALinear) -> None:
    module.adapter[0].detach().numpy()[:] *= 2.0


def other_magnitude(module: doratune.nn.DoRALinear) -> None:
    """Only m: w does not change, but g = m / w does."""
    with torch.no_grad():
        module.adapter[2].copy_(module.adapter[2] * 1.5)


def magnitude_data_in_place(module: doratune.nn.DoRALinear) -> None:
    module.adapter[2].data.mul_(1.5)


SEEN: dict[str, Change] = {
    "another m": other_magnitude,
    "sgd": step(torch.optim.SGD),
    "adamw, foreach": step(torch.optim.AdamW, foreach=True),
    "adamw, fused": step(torch.optim.AdamW, fused=True),
    "adamw, for-loop": step(torch.optim.AdamW, foreach=False),
    "an optimizer behind the version's back": step(BehindTheBack),
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_by_assignment,
    "copy_": copy_in_place,
    ".data = …": assign_data,
    "a new parameter": new_parameter,
    "merge, unmerge": merge_and_unmerge,
    "another W": other_weight,
    "another s": other_scaling,
    "module.to": there_and_back,
    "freed and taken again": freed_and_taken_again,
}
UNSEEN: dict[str, Change] = {
    ".data in place": data_in_place,
    "W.data in place": weight_data_in_place,
    "m.data in place": magnitude_data_in_place,
    "a pointer": through_a_pointer,
}
"""Changes that do not show in the tensor's version or address."""


@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("change", "reuse"),
    [
        *((change, reuse) for change in SEEN for reuse in ("auto", "tracked", "off")),
        *((change, reuse) for change in UNSEEN for reuse in ("auto", "off")),
    ],
)
def test_every_change_of_the_weights_gives_a_new_norm(change: str, reuse: str, no_grad: bool) -> None:
    module, x = make_module(reuse), torch.randn(5, D_IN)
    for _ in range(2):
        with torch.set_grad_enabled(not no_grad):
            before = module(x)
            torch.testing.assert_close(before, by_the_book(module, x), rtol=1e-5, atol=1e-5)
        (SEEN | UNSEEN)[change](module)
        with torch.set_grad_enabled(not no_grad):
            after = module(x)
            torch.testing.assert_close(after, by_the_book(module, x), rtol=1e-5, atol=1e-5)
        assert change.startswith("merge") or not torch.equal(before, after)


@pytest.mark.parametrize("change", SEEN)
def test_a_change_between_forward_and_recompute_is_seen_too(change: str, computed: list[torch.Tensor]) -> None:
    module, x = make_module(), torch.randn(5, D_IN, requires_grad=True)
    y = checkpoint(module, x, use_reentrant=True)
    (SEEN)[change](module)
    if "assign" in change or change in ("module.to", "a new parameter"):
        return  # autograd itself refuses or forgets: the graph has the old parameter
    y.sum().backward()
    assert len(computed) == 2
    torch.testing.assert_close(computed[1], module.norm(), rtol=1e-6, atol=0.0)


@pytest.mark.skipif(not knows_backward, reason="this PyTorch does not tell one backward pass from another")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_takes_the_norm_of_its_forward_pass(reentrant: bool, computed: list[torch.Tensor]) -> None:
    module, x = make_module(), torch.randn(5, D_IN, requires_grad=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for steps in range(1, 4):
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        assert len(computed) == steps, "one norm for each forward pass, none for its recompute"
        optimizer.step()


def test_off_computes_again_in_the_recompute(computed: list[torch.Tensor]) -> None:
    module, x = make_module("off"), torch.randn(5, D_IN, requires_grad=True)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert len(computed) == 2


def test_auto_computes_in_every_forward_pass_and_tracked_only_after_a_change(computed: list[torch.Tensor]) -> None:
    x = torch.randn(5, D_IN)
    auto, tracked = make_module("auto"), make_module("tracked")
    for module, count in ((auto, 3), (tracked, 1)):
        computed.clear()
        for _ in range(3):
            module(x).sum().backward()
        assert len(computed) == count
        step(torch.optim.SGD)(module)
        module(x)
        assert len(computed) == count + 1


def test_the_part_of_w_is_computed_once_while_only_the_adapter_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    row_squares = norm_cache.row_squares

    def spy(weight: torch.Tensor) -> torch.Tensor:
        made.append(row_squares(weight))
        return made[-1]

    monkeypatch.setattr(norm_cache, "row_squares", spy)
    x = torch.randn(5, D_IN)
    for reuse, count in (("tracked", 1), ("auto", 0), ("off", 0)):
        made.clear()
        module = make_module(reuse)
        for optimizer in (torch.optim.SGD, torch.optim.AdamW):
            torch.testing.assert_close(module(x), by_the_book(module, x), rtol=1e-5, atol=1e-5)
            step(optimizer)(module)
        assert len(made) == count
    module = make_module("tracked")
    for change in (other_weight, assign_weight):
        made.clear()
        module(x)
        change(module)
        torch.testing.assert_close(module(x), by_the_book(module, x), rtol=1e-5, atol=1e-5)
        assert made


def assign_weight(module: doratune.nn.DoRALinear) -> None:
    module.base_layer.weight.data = torch.randn(D_OUT, D_IN)


def test_a_recomputed_layer_has_the_same_gradients_with_and_without_reuse() -> None:
    x = torch.randn(5, D_IN)
    grads = []
    for reuse in ("auto", "off"):
        module = make_module(reuse)
        checkpoint(module, x, use_reentrant=False).square().sum().backward()
        grads.append([parameter.grad for parameter in module.adapter])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_autocast_and_plain_forward_passes_have_norms_of_their_own() -> None:
    module, x = make_module("tracked"), torch.randn(5, D_IN)
    plain = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    assert torch.equal(module(x), plain)


def test_inference_mode_and_its_tensors_work(computed: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        module = make_module("tracked")
        y = module(torch.ones(2, D_IN))
        module.adapter[1].mul_(2.0)
        assert not torch.equal(module(torch.ones(2, D_IN)), y)
    assert len(computed) == 2


def test_a_copy_or_a_pickled_module_starts_without_the_norm(computed: list[torch.Tensor]) -> None:
    module, x = make_module("tracked"), torch.randn(5, D_IN)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
    assert len(computed) == 3


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(NormReuseError, match="norm_reuse must be one of auto, tracked, off, got 'always'"):
        NormCache("always")


def test_a_pass_without_gradients_inside_a_backward_pass_is_no_recompute() -> None:
    torch.manual_seed(0)
    layer = doratune.nn.DoRALinear(8, 6, 2, 4.0)
    other = doratune.nn.DoRALinear(8, 6, 2, 4.0)
    lora_b = layer.adapter[1]
    with torch.no_grad():
        lora_b.normal_()
    x, seen = torch.randn(5, 8), list[torch.Tensor]()

    def look(gradient: torch.Tensor) -> None:
        with torch.no_grad():
            lora_b.data.mul_(-0.5)  # unseen by PyTorch
            seen.append(layer(x))

    y = layer(x)
    y.register_hook(look)
    y.sum().backward()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(seen[0], other(x).detach())
