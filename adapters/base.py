"""The layers of an adapter by the names of the model's modules, and where their W is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .adapter import Adapter
from .checkpoint import Checkpoint
from .errors import AdapterError
from .keys import LYCORIS, PEFT_PREFIX, A, B

_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
"""Before the names of layers, of LyCORIS, kohya's scripts and ai-toolkit."""


@dataclass(frozen=True)
class Base:
    """The module of a layer: its ``name`` with dots, and, where a checkpoint is given, the tensor that is its W.

    ``transposed``: W is stored as [d_in, d_out].
    """

    name: str
    weight: str = ""
    transposed: bool = False

    def rows(self, checkpoint: Checkpoint) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of W, as :meth:`.Checkpoint.rows`."""
        return checkpoint.rows(self.weight, transposed=self.transposed)


def base_of(adapter: Adapter, checkpoint: Checkpoint | None) -> dict[str, Base]:
    """The module of each of the adapter's layers.

    Raises:
        AdapterError: a layer is not A, B and m, or two are one module; a name has no dots and nothing says where
            they were; the checkpoint does not have a layer, has another shape there, or packed weights.
    """
    for module in adapter.layers:
        adapter.check_parts(module)
    flat = checkpoint.by_flat_name() if checkpoint is not None else {}
    names = {module: dotted(module, flat, adapter) for module in adapter.layers}
    if adapter.format == LYCORIS:
        for module, name in names.items():
            if name == module and "." not in name:
                raise AdapterError(
                    f"{adapter.path}: {module} has underscores where the model has dots; name the model's checkpoint "
                    "with --checkpoint, which tells them apart"
                    + (" (this one has no such layer)" if checkpoint else "")
                )
    seen: dict[str, str] = {}
    for module, name in names.items():
        if name in seen:
            raise AdapterError(
                f"{adapter.path}: {seen[name]} and {module} are both {name} of the model; save the adapter again with "
                "one of them"
            )
        seen[name] = module
    if checkpoint is None:
        return {module: Base(name) for module, name in names.items()}
    if checkpoint.quantised:
        raise AdapterError(
            f"{checkpoint.path}: its weights are quantised ({checkpoint.quantised}); give the checkpoint in bf16, "
            "fp16 or fp32 that it was quantised from"
        )
    weights = checkpoint.weights_of(names.values())
    found = {}
    for module, name in names.items():
        if name not in weights:
            raise AdapterError(f"{checkpoint.path}: has no weight for {name}; the adapter is for another model")
        info = checkpoint.tensors.infos[weights[name]]
        if not info.dense:
            raise AdapterError(
                f"{checkpoint.path}: {info.name} is packed as {info.dtype}; give the checkpoint that it was quantised "
                "from"
            )
        a, b = (adapter.tensors.infos[adapter.layers[module][part]].shape for part in (A, B))
        d_in = 1
        for size in a[1:]:
            d_in *= size
        flag = adapter.config is not None and adapter.config.fan_in_fan_out
        transposed = checkpoint.is_transposed(info, b[0], d_in, flag)
        if transposed is None:
            raise AdapterError(
                f"{checkpoint.path}: {info.name} is {list(info.shape)}, and {name} of the adapter is for "
                f"[{b[0]}, {d_in}]; the adapter is for a model of another size"
            )
        found[module] = Base(name, info.name, transposed)
    return found


def saved_with(adapter: Adapter, checkpoint: Checkpoint, bases: dict[str, Base]) -> set[str]:
    """The names of tensors of the adapter that are W of its layers over again: PEFT saves an adapted head's W with it.

    Raises:
        AdapterError: one is not the checkpoint's.
    """
    found = set()
    for name in adapter.keys.others:
        own_name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        module = own_name.removesuffix(".weight")
        if own_name == module or module not in bases:
            continue
        base, info = bases[module], adapter.tensors.infos[name]
        same = info.dense and info.shape == checkpoint.tensors.infos[base.weight].shape
        pairs = zip(adapter.tensors.rows(name), checkpoint.tensors.rows(base.weight), strict=True) if same else ()
        if not same or not all(torch.equal(own, w.to(own.dtype)) for (_, own), (_, w) in pairs):
            raise AdapterError(
                f"{adapter.path}: {name} is another W than {base.weight} of {checkpoint.path}, as where the vocabulary "
                "grew; save the model that the adapter was trained on, and give that checkpoint"
            )
        found.add(name)
    return found


def dotted(module: str, flat: dict[str, str], adapter: Adapter) -> str:
    """The name with dots of a LyCORIS layer: as doratune noted it, or as the checkpoint's only such name."""
    if adapter.format != LYCORIS:
        return module
    noted = adapter.note.get("modules")
    if isinstance(noted, dict) and isinstance(noted.get(module), str):
        return str(noted[module])
    for prefix in _PREFIXES:
        if module.startswith(prefix) and module.removeprefix(prefix) in flat:
            return flat[module.removeprefix(prefix)]
    return module
