"""dorafactors, the code of "Scaling DoRA" (arXiv 2603.22276), run from a checkout given by path.

Its DoRA is a patched PEFT. Two of the patched files hold all that differs for linear layers (``dora.py`` and the
Triton kernels in ``dora_fused.py``), one more the way a layer calls them (``variants.py``). They are loaded beside the
installed PEFT, under names that it does not use, so that one process runs both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ..errors import UsageError
from ..internals.versions import PEFT_EXTRA, import_fault

_LAYOUTS = ("code/peft_patched/src", "vendor/dorafactors-peft/src", "src")
"""Where a checkout of the repository, with its submodule, or of the submodule alone has the patched PEFT."""

_FOLDER = "peft/tuners/lora"
_FUSED_MODULE = "peft.tuners.lora.dora_fused"
"""The name under which dora.py looks for its kernels; PEFT has no module of that name."""


class PeerError(UsageError):
    """The checkout of a peer is not what this benchmark knows how to run."""


class Dorafactors:
    """dorafactors' own functions, from the checkout at ``path``.

    Attributes:
        version: the commit of the checkout, or a digest of the loaded files where it is no git checkout.

    Raises:
        PeerError: there is no such checkout, PEFT is missing, or the files do not hold what is called here.
    """

    def __init__(self, path: Path) -> None:
        folder = _find(path)
        fused = _load(_FUSED_MODULE, folder / "dora_fused.py")
        dora = _load("peft.tuners.lora.dorafactors_dora", folder / "dora.py")
        variants = _load("peft.tuners.lora.dorafactors_variants", folder / "variants.py")
        self.version = _version(path, folder)
        self._layer = _get(dora, "DoraLinearLayer", "_get_weight_norm_linear")
        self._compose = _get(dora, "fused_dora_compose")
        self._function = _get(fused, "FusedDoRAComposeFunction", "backward")
        self._variant = _get(variants, "DoraLinearVariant", "forward")

    def norm(self, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
        """The row norms of W + sBA by its factored norm, in the dtype of W, as its layer computes them."""
        norm: torch.Tensor = self._layer(False)._get_weight_norm_linear(
            base_weight=weight, lora_A_w=lora_a, lora_B_w=lora_b, scaling=scaling
        )
        return norm

    def compose(
        self, base: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, scaling: float, *, inplace: bool
    ) -> torch.Tensor:
        """The layer's output from the base output and the LoRA output: its fused delta, added to the base output.

        ``inplace`` writes the delta over ``lora``, as its inference does; training takes new memory.
        """
        gain = g.to(lora.dtype).view(1, -1)  # its layer gives the kernel one dtype
        delta: torch.Tensor = self._compose(lora, base, gain, scaling, inplace=inplace)
        return base + delta.to(base.dtype)

    def compose_backward(
        self, dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dlora, the delta's part of the base gradient, and dg [1, d_out], by its autograd function's backward.

        Autograd would then add the second to dY to have the base gradient: that pass is not included.
        """
        saved = SimpleNamespace(
            saved_tensors=(inner, g.to(dy.dtype).view(1, -1)),
            needs_mag=True,
            scale=scaling,
            needs_input_grad=(True, True, True, False),
        )
        d_lora, d_base, d_mag, _ = self._function.backward(saved, dy)
        return d_lora, d_base, d_mag

    def activate(self, model: torch.nn.Module) -> int:
        """Make every DoRA linear layer of a PEFT model run dorafactors; returns their number.

        The magnitudes stay the same parameters. What was there is kept for :meth:`deactivate`.

        Raises:
            PeerError: the model has no DoRA linear layer.
        """
        count = 0
        for module, adapter, layer in _dora_layers(model):
            if type(layer).__name__ == "DoraLinearLayer" and not isinstance(layer, self._layer):
                theirs = self._layer(layer.fan_in_fan_out)
                theirs.weight = layer.weight
                theirs.train(layer.training)
                theirs.__dict__["_replaces"] = (layer, module.lora_variant[adapter])  # not a child, not in state dicts
                module.lora_magnitude_vector[adapter] = theirs
                module.lora_variant[adapter] = self._variant()
                count += 1
        if not count:
            raise PeerError("dorafactors has nothing to run: the model has no DoRA linear layer")
        return count

    def deactivate(self, model: torch.nn.Module) -> None:
        """Put back what :meth:`activate` replaced."""
        for module, adapter, layer in _dora_layers(model):
            if "_replaces" in layer.__dict__:
                module.lora_magnitude_vector[adapter], module.lora_variant[adapter] = layer.__dict__["_replaces"]


def _dora_layers(model: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """Each PEFT layer with a magnitude, the adapter's name and the module that holds the magnitude."""
    found: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        magnitudes: Any = getattr(module, "lora_magnitude_vector", None) or {}
        found += [(module, adapter, layer) for adapter, layer in magnitudes.items()]
    return found


def _find(path: Path) -> Path:
    for layout in _LAYOUTS:
        folder = path / layout / _FOLDER
        if (folder / "dora_fused.py").is_file():
            return folder
    raise PeerError(
        f"--peer-path {path}: no dorafactors there (looked for {_FOLDER}/dora_fused.py under {', '.join(_LAYOUTS)}); "
        "give the root of a checkout of sockeye44/dorafactors"
    )


def _load(name: str, file: Path) -> ModuleType:
    """Load a file as a module; a second load of the same file gives the same module."""
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) != str(file):
            raise PeerError(f"{name} is already loaded from {known.__file__}: one checkout of dorafactors a process")
        return known
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PeerError(f"dorafactors runs inside PEFT: {import_fault('peft', error, PEFT_EXTRA)}") from error
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise PeerError(f"dorafactors: {file} is missing; its layout has changed since this benchmark was written")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PeerError(f"dorafactors: {file} does not load beside the installed PEFT: {error}") from error
    return module


def _get(module: ModuleType, name: str, attribute: str | None = None) -> Any:
    found = getattr(module, name, None)
    if found is None or (attribute is not None and not hasattr(found, attribute)):
        raise PeerError(
            f"dorafactors: {module.__file__} has no {name}{f'.{attribute}' if attribute else ''}; "
            "it has changed since this benchmark was written"
        )
    return found


def _version(path: Path, folder: Path) -> str:
    if (path / ".git").exists():
        done = subprocess.run(["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    content = b"".join((folder / name).read_bytes() for name in ("dora.py", "dora_fused.py", "variants.py"))
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
