"""Other projects' fused functions for LoRA: a whole MLP, all of q, k and v, and o, put into a PEFT model's modules.

Only the files with these functions are loaded, in packages that hold nothing else of their project. The rest would
bring its trainers, and change PEFT and transformers where it is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .dorafactors import PeerError

_LAYOUTS = ("src", ".")
"""Where a checkout, or an unpacked wheel, has the package."""

QKV, MLP, O = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ("o_proj",)  # noqa: E741

Apply = Callable[..., Any]


class FusedFunctions:
    """A project's functions ``apply_lora_mlp_swiglu``, ``apply_lora_qkv`` and ``apply_lora_o``.

    ``biases``: whether they add the base layers' biases. Otherwise a module whose projections have some stays PEFT's.
    """

    def __init__(self, module: ModuleType, project: str, *, biases: bool) -> None:
        self._project, self._biases = project, biases
        self._mlp, self._qkv, self._o = (
            _get(module, name, project) for name in ("apply_lora_mlp_swiglu", "apply_lora_qkv", "apply_lora_o")
        )

    def activate(self, model: nn.Module) -> int:
        """Make attentions and MLPs of a PEFT model run the functions; returns how many functions were put in.

        An attention has q_proj, k_proj, v_proj and o_proj, an MLP gate_proj, up_proj and down_proj with SiLU, and all
        of them adapters. The parameters stay the same.

        Raises:
            PeerError: the model has none of them, an MLP with another activation, or a W in a format that they misread.
        """
        _require_readable(model, self._project)
        count = 0
        for module in list(model.modules()):
            if self._fits(module, MLP):
                _require_silu(module, self._project)
                _set_forward(module, _of(module, self._mlp))
                count += 1
            if self._fits(module, QKV):
                self._activate_qkv(module)
                count += 1
            if self._fits(module, O):
                _set_forward(module.o_proj, _of(module, self._o))
                count += 1
        if not count:
            raise PeerError(
                f"{self._project} has nothing to run: no attention or MLP of the model has adapters on all projections"
            )
        return count

    def _activate_qkv(self, attention: nn.Module) -> None:
        """q_proj computes all three; k_proj and v_proj, which are called after it with the same x, hand out theirs."""
        apply, kept = self._qkv, dict[str, torch.Tensor]()

        def query(x: torch.Tensor) -> torch.Tensor:
            q, kept["k"], kept["v"] = apply(attention, x)
            result: torch.Tensor = q
            return result

        _set_forward(attention.q_proj, query)
        _set_forward(attention.k_proj, lambda x: kept.pop("k"))
        _set_forward(attention.v_proj, lambda x: kept.pop("v"))

    def _fits(self, module: nn.Module, names: Iterable[str]) -> bool:
        projections = [getattr(module, name, None) for name in names]
        return all(hasattr(one, "lora_A") and (self._biases or _bias_of(one) is None) for one in projections)


def find_package(path: Path, package: str, files: Iterable[str], option: str) -> Path:
    """The folder ``package``/kernels of a checkout or an unpacked wheel that has all the ``files``.

    Raises:
        PeerError: there is none.
    """
    for layout in _LAYOUTS:
        folder = path / layout / package / "kernels"
        if all((folder / f"{name}.py").is_file() for name in files):
            return folder
    raise PeerError(
        f"{option} {path}: no {package} there (looked for {package}/kernels with {', '.join(files)} in it, also under "
        f"src); give the root of a checkout, or a folder into which its wheel was unpacked (pip download {package} "
        f"--no-deps; unzip {package}-*.whl)"
    )


def load_kernels(folder: Path, module: str, stand_ins: Callable[[], None]) -> ModuleType:
    """The module ``kernels.<module>`` of the package around ``folder``, without running the package's own __init__.

    ``stand_ins`` makes what the kernels need of the rest of their project.

    Raises:
        PeerError: the package is loaded already, or the module does not load.
    """
    package = folder.parent.name
    known = sys.modules.get(f"{package}.kernels")
    if known is not None and list(known.__path__) != [str(folder)]:
        raise PeerError(f"{package} is already loaded from {list(known.__path__)}: one {package} a process")
    if known is None:
        if package in sys.modules:
            raise PeerError(f"{package} itself is loaded in this process; its kernels are run without the rest of it")
        empty_package(package, folder.parent)
        empty_package(f"{package}.kernels", folder)
        stand_ins()
    try:
        return importlib.import_module(f"{package}.kernels.{module}")
    except Exception as error:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        raise PeerError(f"{package}: {folder} does not load: {type(error).__name__}: {error}") from error


def empty_package(name: str, folder: Path | None = None) -> Any:
    """Put a package without contents into sys.modules; its modules are looked for in ``folder``."""
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    return module


def version_of(path: Path, folder: Path) -> str:
    """The wheel's version, the commit of the checkout, or a digest of the files in ``folder``."""
    package = folder.parent.name
    wheels = list(path.glob(f"{package}-*.dist-info"))
    if len(wheels) == 1:
        return wheels[0].name.removeprefix(f"{package}-").removesuffix(".dist-info")
    if (path / ".git").exists():
        done = subprocess.run(["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    content = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _get(module: ModuleType, name: str, project: str) -> Apply:
    found: Apply | None = getattr(module, name, None)
    if found is None:
        raise PeerError(f"{project}: {module.__file__} has no {name}; it has changed since this benchmark was written")
    return found


def _of(module: nn.Module, apply: Apply) -> Apply:
    return lambda x: apply(module, x)


def _set_forward(module: Any, forward: Apply) -> None:
    module.forward = forward


def _bias_of(projection: Any) -> torch.Tensor | None:
    bias: torch.Tensor | None = projection.base_layer.bias
    return bias


def _require_readable(model: nn.Module, project: str) -> None:
    """Refuse quantised layers but bitsandbytes' NF4: the functions take any other W for a plain matrix."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            base: Any = module.base_layer
            weight = getattr(base, "weight", None)
            plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
            state = getattr(weight, "quant_state", None)
            if not plain and getattr(state, "quant_type", None) != "nf4":
                raise PeerError(
                    f"{project}'s functions read plain weights and NF4, not that of a {type(base).__name__}"
                )


def _require_silu(mlp: nn.Module, project: str) -> None:
    activation = getattr(mlp, "act_fn", None)
    if activation is not None and not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        raise PeerError(f"{project}'s function for the MLP is SwiGLU, and this model's activation is {activation}")
