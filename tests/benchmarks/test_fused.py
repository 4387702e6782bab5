"""axolotl's and Unsloth's functions run where their trainers would put them, on the parameters of a PEFT model.

Small stand-ins for their packages take the place of the checkouts: their kernels need a GPU (tests/gpu/test_bench.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from doratune.benchmarks.adapted import MODES, Peers, contender, with_dora
from doratune.benchmarks.axolotl import Axolotl
from doratune.benchmarks.dorafactors import PeerError
from doratune.benchmarks.shapes import TARGETS, random_model, read_model_config
from doratune.benchmarks.unsloth import Unsloth

pytest.importorskip("peft")
pytest.importorskip("transformers")
CPU = torch.device("cpu")

STAND_IN = """
import torch
from bitsandbytes.functional import QuantState
from axolotl.kernels.op_registry import LOG

calls = []

def linear(proj, x):
    base, a, b = proj.base_layer.weight, proj.lora_A["default"].weight, proj.lora_B["default"].weight
    weight = base + proj.scaling["default"] * (b @ a).to(base.dtype)
    y = x @ weight.T
    if "default" in proj.lora_magnitude_vector:
        y = y * (proj.lora_magnitude_vector["default"].weight / weight.norm(dim=1).detach()).to(y.dtype)
    return y

def apply_lora_mlp_swiglu(self, x):
    calls.append("mlp")
    return linear(self.down_proj, torch.nn.functional.silu(linear(self.gate_proj, x)) * linear(self.up_proj, x))

def apply_lora_qkv(self, x):
    calls.append("qkv")
    return linear(self.q_proj, x), linear(self.k_proj, x), linear(self.v_proj, x)

def apply_lora_o(self, x):
    calls.append("o")
    return linear(self.o_proj, x)
"""
OTHERS = ("geglu", "swiglu", "quantize", "utils", "dora")


@pytest.fixture
def unpacked(tmp_path: Path) -> Iterator[Path]:
    """A folder like that of an unpacked wheel; what is loaded from it is forgotten afterwards."""
    folder = tmp_path / "wheel" / "axolotl" / "kernels"
    folder.mkdir(parents=True)
    (folder / "lora.py").write_text(STAND_IN)
    (folder / "op_registry.py").write_text("from axolotl.utils.logging import get_logger\nLOG = get_logger(__name__)\n")
    for name in OTHERS:
        (folder / f"{name}.py").touch()
    (tmp_path / "wheel" / "axolotl-9.8.7.dist-info").mkdir()
    yield tmp_path / "wheel"
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("axolotl", "unsloth", "unsloth_zoo")]:
        del sys.modules[name]


@pytest.fixture
def model(tiny: Path) -> nn.Module:
    _, config = read_model_config("8b", tiny, None)
    return with_dora(random_model(config, CPU), MODES["bf16"], rank=4, targets=TARGETS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_attention_and_mlp_run_axolotls_functions_and_give_what_peft_gives(
    unpacked: Path, model: nn.Module, kind: str
) -> None:
    peers = Peers(axolotl=Axolotl(unpacked))
    theirs, stock = (contender(f"{name}_{kind}", model, peers).model for name in ("axolotl", "peft"))
    calls = sys.modules["axolotl.kernels.lora"].calls
    ids = torch.randint(0, 64, (2, 9))
    found, expected = (one(input_ids=ids).logits.detach() for one in (theirs, stock))
    assert calls == ["qkv", "o", "mlp"] * 2
    assert float((found - expected).norm() / expected.norm()) < 0.02
    other = contender("peft_dora" if kind == "lora" else "peft_lora", model).model(input_ids=ids).logits.detach()
    assert float((found - other).norm() / other.norm()) > 0.02, "LoRA and DoRA differ here"


UNSLOTH = """
from unsloth_zoo.log import logger
from unsloth_zoo.temporary_patches.common import torch_compile
from unsloth_zoo.utils import Version

assert Version("2.11.0+cpu") > Version("2.4")

@torch_compile
def fp8():
    pass

@torch_compile(dynamic = True)
def more():
    pass
"""


@pytest.mark.parametrize("biases", [False, True])
def test_unsloth_runs_plain_lora_and_leaves_projections_with_biases_to_peft(
    unpacked: Path, tiny: Path, tmp_path: Path, biases: bool
) -> None:
    folder = tmp_path / "src" / "unsloth" / "kernels"
    folder.mkdir(parents=True)
    (folder / "fast_lora.py").write_text(UNSLOTH + STAND_IN.split("LOG\n")[1] + "import torch\n")
    for name in ("utils", "swiglu", "geglu", "fp8"):
        (folder / f"{name}.py").touch()
    if biases:
        tiny.write_text(tiny.read_text().replace("llama", "qwen2"))
    _, config = read_model_config("8b", tiny, None)
    model = with_dora(random_model(config, CPU), MODES["bf16"], rank=4, targets=TARGETS)
    unsloth = Unsloth(tmp_path)
    assert unsloth.version.startswith("sha256:")
    ids = torch.randint(0, 64, (2, 9))
    found = contender("unsloth_lora", model, Peers(unsloth=unsloth)).model(input_ids=ids).logits.detach()
    expected = contender("peft_lora", model).model(input_ids=ids).logits.detach()
    called = ["o", "mlp"] if biases else ["qkv", "o", "mlp"]
    assert sys.modules["unsloth.kernels.fast_lora"].calls == called * 2
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_plain_lora_trains_no_magnitude_and_the_model_itself_keeps_its_own(unpacked: Path, model: nn.Module) -> None:
    theirs = contender("axolotl_lora", model, Peers(axolotl=Axolotl(unpacked))).model
    theirs(input_ids=torch.randint(0, 64, (1, 9))).logits.float().square().mean().backward()
    trained = {
        name.split(".")[-2 if "magnitude" in name else -3] for name, p in model.named_parameters() if p.grad is not None
    }
    assert trained == {"lora_A", "lora_B"}
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


def test_the_version_is_the_wheels_or_else_a_digest(unpacked: Path) -> None:
    assert Axolotl(unpacked).version == "9.8.7"
    (unpacked / "axolotl-9.8.7.dist-info").rmdir()
    assert Axolotl(unpacked).version.startswith("sha256:")


def test_what_is_no_axolotl_or_has_changed_is_an_error(unpacked: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no axolotl there"):
        Axolotl(tmp_path)
    lora = unpacked / "axolotl" / "kernels" / "lora.py"
    lora.write_text(STAND_IN.replace("apply_lora_o", "apply_lora_out"))
    with pytest.raises(PeerError, match="has no apply_lora_o; it has changed"):
        Axolotl(unpacked)
    forget()
    lora.write_text("import nothing_of_this_name")
    with pytest.raises(PeerError, match="does not load: ModuleNotFoundError"):
        Axolotl(unpacked)
    assert "axolotl" not in sys.modules


def test_a_model_that_it_cannot_run_is_an_error(unpacked: Path, model: nn.Module) -> None:
    axolotl = Axolotl(unpacked)
    with pytest.raises(PeerError, match="nothing to run"):
        axolotl.activate(nn.Sequential(nn.Linear(3, 3)))
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.GELU()
    with pytest.raises(PeerError, match="SwiGLU, and this model's activation is GELU"):
        axolotl.activate(model)
