"""Kernels for a GPU that is not here: each has its spec, and nothing behind it.

Rehearsing a model on one of these devices (:mod:`doratune.nn.rehearsal`) finds out on any machine which kernels it asks
for, without a store or a GPU. The two devices differ in whether every fusion pays, and in whether variants have
specialised warps. A kernel that is needed with them alone is asked for on the second alone.
"""

from __future__ import annotations

import torch

from ..codegen.spec import KernelSpec
from .kernel import Kernel

NO_FUSION_PAYS, EVERY_FUSION_PAYS = torch.device("cuda", 126), torch.device("cuda", 127)
"""Device numbers that no machine has."""

ABSENT = (NO_FUSION_PAYS, EVERY_FUSION_PAYS)

GPU = "h200"
"""The GPU field in the spec of such a kernel. Nothing else in a spec depends on it."""


class AbsentKernel(Kernel):
    """A kernel that can be asked for and never launched."""

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        super().__init__(spec, device)

    @property
    def fusion_pays(self) -> bool:
        return self.device == EVERY_FUSION_PAYS

    @property
    def specialises_warps(self) -> bool:
        return self.device == EVERY_FUSION_PAYS
