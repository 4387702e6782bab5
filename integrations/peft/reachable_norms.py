"""What quantised base layers may launch that dense ones do not, found from the layers' shapes and a weight format.

A quantised layer cannot run without values, and need not: it runs the compositions of a dense one whose output others
may see (:mod:`.reachable`), but its norm reads W as it is stored (:mod:`~doratune.nn.stored_norm`). So do a fused
kernel for few tokens and the one that decodes W for a product (:mod:`~doratune.nn.stored_plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.lora.layer import LoraLayer

from ...codegen.ops import DECODE_TOKENS
from ...codegen.spec import KernelSpec
from ...codegen.weight_formats import WeightFormat
from ...nn.norm_layer import StoredLayer
from ...nn.norm_pass import NormPass
from ...nn.rehearsal import META
from ...nn.stored_norm import StoredMatrix, norm_requests
from ...runtime.absent import GPU, NO_FUSION_PAYS
from ...runtime.kernel import Request
from ...runtime.reference import OPERAND_DTYPES
from .variant import DoraVariant


def stored_norm_requests(layers: Iterable[LoraLayer], form: WeightFormat) -> Iterator[Request]:
    """The kernels of the norms of ``layers``, of a model on the meta device, if their W were stored in ``form``.

    Those of each layer alone, and those of passes over any part of them. Autocast counts as it is set now. Shapes that
    the format does not allow have none: such a layer is read through its own forward pass.
    """
    members = [*_members(layers, form)]
    yield from NormPass(members).requests(NO_FUSION_PAYS, parts=True)
    for member in members:
        yield from norm_requests(member.weight, member.lora_A, member.lora_B, NO_FUSION_PAYS)


def stored_product_specs(
    layers: Iterable[LoraLayer], form: WeightFormat, buckets: Iterable[int]
) -> Iterator[KernelSpec]:
    """The specs of ``weight_dequantise`` and ``dora_linear_forward`` that ``layers`` may ask for with W in ``form``.

    Of the latter those of the token buckets that have one. The products have the dtype of W's values.
    """
    few = [bucket for bucket in buckets if bucket <= DECODE_TOKENS and not form.of.rounds_inputs]
    for layer in layers:
        bias = getattr(layer.get_base_layer(), "bias", None) is not None
        for member in _members([layer], form):
            d_out, d_in = member.weight.shape
            sizes = {"d_out": d_out, "d_in": d_in, "rank": member.lora_A.shape[0]}
            yield KernelSpec.create("weight_dequantise", **sizes, dtype=str(form), gpu=GPU)
            for bucket in few:
                how = {"dtype": str(form), "adapter": form.dtype, "bias": bias, "gpu": GPU}
                yield KernelSpec.create("dora_linear_forward", **sizes, **how, tokens=bucket)


def _members(layers: Iterable[LoraLayer], form: WeightFormat) -> Iterator[StoredLayer]:
    for layer in layers:
        matrix = _matrix(form, layer.out_features, layer.in_features)
        if matrix is None:
            continue
        for adapter, variant in layer.lora_variant.items():
            if isinstance(variant, DoraVariant):
                a, b, m = (held[adapter].weight for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
                yield StoredLayer(matrix, a, b, m, layer.scaling[adapter], variant.norms)


def _matrix(form: WeightFormat, d_out: int, d_in: int) -> StoredMatrix | None:
    """A W of this format without values; None if the format has none of this shape."""
    if form.refuse(d_out, d_in) is not None:
        return None
    operands = form.operands(d_out, d_in)
    tensors = [torch.empty(each.elements, dtype=OPERAND_DTYPES[each.dtype], device=META) for each in operands]
    return StoredMatrix(form, tuple(tensors), d_out, d_in)
