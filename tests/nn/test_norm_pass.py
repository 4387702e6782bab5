"""A norm pass gives each layer the norm that the layer would compute, once, and only while nothing that it depends on
has changed; whatever a pass leaves out computes alone.

Runs on the CPU, where the eager reference takes the place of the grouped kernels; tests/gpu runs those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from doratune.nn import norm_cache, norm_pass, norm_table
from doratune.nn.norm import norm_and_gain_of
from doratune.nn.norm_cache import NormCache, opened
from doratune.nn.norm_layer import NormLayer
from doratune.nn.norm_pass import NormPass
from doratune.nn.norm_table import places_of

D_OUT, D_IN, RANK = 12, 20, 3


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many norms a pass and the layers themselves have computed."""
    count: Counter[str] = Counter()

    def counting(where: str) -> Callable[..., object]:
        def compute(*arguments: object) -> object:
            count[where] += 1
            return norm_and_gain_of(*arguments)  # type: ignore[arg-type]

        return compute

    monkeypatch.setattr(norm_pass, "norm_and_gain_of", counting("pass"))
    monkeypatch.setattr(norm_cache, "norm_and_gain_of", counting("alone"))
    return count


def layer(seed: int = 0, reuse: str = "auto", scaling: float = 0.5, dtype: torch.dtype = torch.float32) -> NormLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = (normal(D_OUT, D_IN), normal(RANK, D_IN), normal(D_OUT, RANK), normal(D_OUT))
    return NormLayer(*tensors, scaling, NormCache(reuse))


def ask(of: NormLayer, *, trains: bool = False, **other: object) -> tuple[torch.Tensor, torch.Tensor]:
    """w and g as the layer asks for them, with ``other`` values in place of its own."""
    now = of._replace(**other)  # type: ignore[arg-type]
    return of.norms.gain_of_weight(*now.tensors, now.scaling, rounded=(now.lora_A, now.lora_B), trains=trains)


def wanted(of: NormLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return norm_and_gain_of(*of.tensors, of.scaling)


def assert_right(of: NormLayer, **other: object) -> None:
    for value, exact in zip(ask(of, **other), wanted(of._replace(**other)), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(value, exact)


def test_each_layer_gets_its_own_norm_from_the_pass(computed: Counter[str]) -> None:
    layers = [layer(seed, scaling=0.5 + (seed == 2)) for seed in range(5)]
    by = NormPass(layers).open()
    for each in layers:
        assert_right(each)
    assert by is not None
    by.close()
    assert computed == {"pass": 5}
    assert opened() is None


def test_only_the_first_call_within_the_pass_gets_it(computed: Counter[str]) -> None:
    one = layer()
    by = NormPass([one]).open()
    assert by is not None
    assert_right(one)
    one.lora_A.data.mul_(2.0)  # PyTorch sees no such write
    assert_right(one)
    by.close()
    assert computed == {"pass": 1, "alone": 1}


def test_no_norm_outlives_its_pass(computed: Counter[str]) -> None:
    one = layer()
    by = NormPass([one]).open()
    assert by is not None
    by.close()
    one.lora_B.data.mul_(2.0)
    assert_right(one)
    assert computed == {"pass": 1, "alone": 1}


WRITES = {
    "in place": lambda tensor: tensor.mul_(2.0),
    "new data": lambda tensor: setattr(tensor, "data", tensor.data * 2.0),
    "resized data": lambda tensor: setattr(tensor, "data", torch.randn(tensor.shape)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=[*WRITES])
@pytest.mark.parametrize("index", range(4))
def test_a_write_within_the_pass_is_seen(
    index: int, write: Callable[[torch.Tensor], None], computed: Counter[str]
) -> None:
    first, second = layer(0), layer(1)
    by = NormPass([first, second]).open()
    assert by is not None
    write(first.tensors[index])
    assert_right(first)
    assert_right(second)
    by.close()
    assert computed == {"pass": 2, "alone": 1}


def test_a_step_of_an_optimizer_within_the_pass_is_seen(computed: Counter[str]) -> None:
    one = layer()
    one.lora_A.requires_grad_().grad = torch.ones(RANK, D_IN)
    by = NormPass([one]).open()
    assert by is not None
    torch.optim.SGD([one.lora_A], lr=0.1).step()
    assert_right(one)
    by.close()
    assert computed["alone"] == 1


def test_other_tensors_scalings_and_roundings_are_computed(computed: Counter[str]) -> None:
    one = layer()
    for other in (
        {"scaling": 0.25},
        {"weight": one.weight.clone()},
        {"lora_A": one.lora_A.clone()},
        {"magnitude": one.magnitude * 2.0},
        {"lora_A": one.lora_A.bfloat16(), "lora_B": one.lora_B.bfloat16()},
    ):
        by = NormPass([one]).open()
        assert by is not None
        assert_right(one, **other)
        by.close()
    assert computed == {"pass": 5, "alone": 5}


def test_a_pass_after_new_data_reads_the_new(computed: Counter[str]) -> None:
    layers = [layer(seed) for seed in range(2)]
    norms = NormPass(layers)
    for _ in range(3):
        by = norms.open()
        assert by is not None
        for each in layers:
            assert_right(each)
        by.close()
        layers[0].weight.data = torch.randn(D_OUT, D_IN)
        layers[1].lora_B.data.add_(1.0)
    assert computed == {"pass": 6}


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.randn(D_IN, D_OUT).T},
        {"weight": torch.randn(D_OUT, D_IN, dtype=torch.float64)},
        {"weight": torch.randn(D_OUT, D_IN, device="meta")},
        {"lora_B": torch.randn(D_OUT, 2 * RANK)[:, ::2]},
        {"lora_A": torch.randn(RANK, D_IN).bfloat16(), "lora_B": torch.randn(D_OUT, RANK).bfloat16()},
        {"magnitude": torch.randn(D_OUT, dtype=torch.float64)},
        {"norms": NormCache("off")},
    ],
    ids=lambda change: " ".join(change),
)
def test_what_no_kernel_reads_is_left_out(change: dict[str, object]) -> None:
    odd, plain = layer()._replace(**change), layer(1)  # type: ignore[arg-type]
    norms = NormPass([odd, plain])
    assert len(norms) == 1
    by = norms.open()
    assert by is not None
    if not odd.weight.is_meta:
        assert_right(odd)
    assert_right(plain)
    by.close()


def test_tensors_made_in_inference_mode_are_left_out() -> None:
    with torch.inference_mode():
        one = layer()
    assert len(NormPass([one])) == 0


def test_tracked_norms_are_computed_once_until_a_write(computed: Counter[str]) -> None:
    layers = [layer(seed, "tracked") for seed in range(3)]
    norms = NormPass(layers)
    for _ in range(3):
        by = norms.open()
        assert by is not None
        for each in (*layers, *layers):
            assert_right(each)
        by.close()
    assert computed == {"pass": 3}
    layers[1].lora_A.mul_(2.0)
    by = norms.open()
    assert by is not None
    for each in layers:
        assert_right(each)
    by.close()
    assert computed["pass"] == 6
    assert computed["alone"] == 0


def test_a_layer_that_does_not_ask_is_left_out_until_it_asks_again(computed: Counter[str]) -> None:
    asks, idle = layer(0), layer(1)
    norms = NormPass([asks, idle])

    def run(*layers: NormLayer) -> dict[str, int]:
        before = Counter(computed)
        by = norms.open()
        assert by is not None
        for each in layers:
            assert_right(each)
        by.close()
        return dict(computed - before)

    assert [run(asks) for _ in range(4)] == [{"pass": 2}, {"pass": 2}, {"pass": 1}, {"pass": 1}]
    assert [run(asks, idle) for _ in range(3)] == [{"pass": 1, "alone": 1}, {"pass": 1, "alone": 1}, {"pass": 2}]


def test_passes_nest(computed: Counter[str]) -> None:
    outer_layer, inner_layer = layer(0), layer(1)
    outer = NormPass([outer_layer]).open()
    inner = NormPass([inner_layer]).open()
    assert outer is not None
    assert inner is not None
    assert_right(inner_layer)
    inner.close()
    assert opened() is outer
    assert_right(outer_layer)
    outer.close()
    assert computed == {"pass": 2}


def test_under_a_dispatch_mode_no_pass_is_opened() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    with Seeing():
        assert NormPass([layer()]).open() is None
    assert opened() is None


def test_a_failing_pass_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(norm_pass, "norm_and_gain_of", fails)
    with pytest.raises(MemoryError):
        NormPass([layer()]).open()
    assert opened() is None


def test_autocast_rounds_as_the_layers_do(computed: Counter[str]) -> None:
    one = layer()._replace(weight=torch.randn(D_OUT, D_IN).bfloat16())
    a, b = one.lora_A.bfloat16(), one.lora_B.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        by = NormPass([one]).open()
        assert by is not None
        norm, g = one.norms.gain_of_weight(*one.tensors, one.scaling, rounded=(a, b))
        by.close()
    exact = norm_and_gain_of(one.weight, a, b, one.magnitude, one.scaling)
    assert computed == {"pass": 1}
    assert torch.equal(norm, exact[0])
    assert torch.equal(g, exact[1])


def test_only_matrices_must_be_near_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel maps matrices with 32-bit coordinates; m, of a few bytes a unit, is found wherever it is."""
    rows, cols, rank, apart = 512, 256, 128, 1 << 20
    memory = torch.zeros(2 * apart + 512, dtype=torch.float32)
    memory = memory[-memory.data_ptr() // 4 % 128 :]  # begins at a multiple of 512 bytes

    def made(begin: int, distance: int) -> NormLayer:
        w, a, b = (
            memory[begin:][: rows * cols],
            memory[begin + rows * cols :][: rank * cols],
            memory[begin:][: rows * rank],
        )
        m = memory[distance:][:rows]
        return NormLayer(w.view(rows, cols), a.view(rank, cols), b.view(rows, rank), m, 0.5, NormCache())

    layers = [made(0, 0), made(512, apart)]
    monkeypatch.setattr(norm_table, "MOST_UNITS", 64)  # 32 kB between W, which are 2 kB apart; m are 4 MB apart
    fits, _, places = places_of(layers)
    assert [fit.norms for fit in fits] == [each.norms for each in layers]
    assert places[1][3] == apart
    far = [made(0, 0), made(apart, 0)]
    assert len(places_of(far)[0]) == 1, "W are 4 MB apart"
