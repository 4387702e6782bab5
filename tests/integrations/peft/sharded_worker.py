"""One of two processes that train an accelerated model, sharded, next to stock PEFT in one piece; run by the tests.

usage: python sharded_worker.py RANK RENDEZVOUS_FILE CASE...; the import path holds this folder and doratune. Prints one
JSON object for each case, with doratune's warnings.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from peft_models import (
    VOCABULARY,
    assert_same_gradients,
    gradients,
    in_four_bits,
    llama,
    relative,
    twin,
    with_dora,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import doratune
from doratune.integrations.peft import examine, gated, stored, stored_place

WORLD = 2


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def train(case: str, rank: int) -> None:
    """Two steps of SGD; each rank has its own tokens, and stock PEFT has them all."""
    torch.manual_seed(0)
    base = llama().float()
    if "nf4" in case:
        base = llama(hidden=64, intermediate=128).float()
        in_four_bits(base, storage=torch.float32)  # FSDP2 shards what has a dtype of floats
    stock = with_dora(base)
    fast: Any = twin(stock)
    if case != "fsdp2-late":
        assert len(doratune.accelerate(fast, quiet=True).accelerated) == 14
    if case.endswith("checkpoint"):
        fast.enable_input_require_grads()
        fast.gradient_checkpointing_enable({"use_reentrant": False})
        fast.train()
    if case.startswith("ddp"):
        fast = DistributedDataParallel(fast)
    elif case.startswith("fsdp2"):
        if case == "fsdp2-leaves":
            for name, module in fast.named_modules():
                if name.endswith(("lora_A.default", "lora_B.default")):
                    fully_shard(module)
        for block in blocks(fast):
            fully_shard(block)
        fully_shard(fast)
        if case == "fsdp2-late":
            report = doratune.accelerate(fast, quiet=True)
            assert {layer.runs for layer in report.layers} == {"pending"}
            assert "DTensor" in report.layers[0].remark
    else:
        policy = None
        if case == "fsdp1-policy":
            from peft.utils.other import fsdp_auto_wrap_policy

            policy = fsdp_auto_wrap_policy(fast)
        else:
            from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

            policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(blocks(fast)[0])})
        # PEFT's policy puts trained and frozen parameters into units of their own, and reads the shapes of weights that
        # only flat parameters without use_orig_params still show.
        fast = FullyShardedDataParallel(
            fast, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=case == "fsdp1"
        )

    ids = torch.randint(0, VOCABULARY, (2 * WORLD, 8), generator=torch.Generator().manual_seed(1))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3) for m in (stock, fast)]
    recognised, planned = _count(stored.StorageReader, "_recognise"), _count(stored_place, "compose_stored")
    examined, together = _count(examine, "examine"), _count(gated, "project_mlp")
    for step in range(3):
        if step == 2:
            examined.clear()
            together.clear()
        for optimizer in optimizers:
            optimizer.zero_grad()
        stock(ids, labels=ids).loss.backward()
        mine = ids[2 * rank : 2 * rank + 2]
        loss = fast(mine, labels=mine).loss
        loss.backward()
        losses = [torch.empty(()) for _ in range(WORLD)]
        dist.all_gather(losses, loss.detach())
        expected = stock(ids, labels=ids).loss.detach()
        assert relative(sum(losses) / WORLD, expected) < 1e-5, (step, losses, expected)
        if case.startswith("ddp"):
            assert_same_gradients(fast.module, stock, 1e-4)
        elif case.startswith("fsdp2"):
            wanted = gradients(stock)
            found = {name: gradient.full_tensor() for name, gradient in gradients(fast).items()}
            assert found.keys() == wanted.keys()
            for name, gradient in found.items():
                assert relative(gradient, wanted[name]) < 1e-4, (step, name)
        for optimizer in optimizers:
            optimizer.step()
    if case in ("fsdp2", "fsdp2-checkpoint"):  # the parameters that FSDP2 gathers are those that were examined
        assert not examined
        assert len(together) == len(blocks(stock)) * (2 if case.endswith("checkpoint") else 1)
    if "nf4" in case:  # in the second step, too, and what is gathered anew is not compared with bitsandbytes again
        assert len(recognised) <= 14 < len(planned)


def _count(owner: Any, name: str) -> list[None]:
    """A list that grows with each call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(None)
        return function(*args, **named)

    setattr(owner, name, counted)
    return calls


if __name__ == "__main__":
    rank, rendezvous, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # the other process has failed
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=WORLD, timeout=limit)
    for case in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(case, int(rank))
        said = sorted({str(warning.message) for warning in caught if "doratune" in str(warning.message)})
        print(json.dumps({"case": case, "warnings": "\n".join(said)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # PyTorch 2.10 may abort in a thread of its own while the interpreter ends
