"""Under DDP, FSDP2 and FSDP1 (two processes, gloo) an accelerated model trains like unsharded stock PEFT. A shard is
never mistaken for the full weight: if only PEFT's own calls gather it, PEFT's code runs, with a warning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import doratune

from .peft_models import Pair, four_bits, with_dora

LEFT_TO_PEFT = {
    "ddp": "",
    "fsdp2": "",
    "fsdp2-late": "",  # accelerated after sharding
    "fsdp2-checkpoint": "",
    "fsdp2-leaves": "lora_A is wrapped as FSDPLinear",
    "ddp-nf4": "",
    "fsdp2-nf4": "",
    "fsdp2-nf4-checkpoint": "",
    "fsdp1": "",
    "fsdp1-policy": "lora_A is wrapped as FullyShardedDataParallel",
}
"""What the warning says that leaves layers to PEFT's code, by case; empty where doratune runs them."""


@pytest.mark.slow
def test_sharded_training_is_that_of_stock_peft_in_one_piece(tmp_path: Path) -> None:
    """All cases in the same two processes, because starting them takes longer than what they do."""
    worker = Path(__file__).with_name("sharded_worker.py")
    places = [str(worker.parent), str(Path(doratune.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), tmp_path / "rendezvous", *LEFT_TO_PEFT],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, f"after {output}: {errors[-5000:]}"
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert [each["case"] for each in said] == [*LEFT_TO_PEFT]
        for each in said:
            wanted = LEFT_TO_PEFT[each["case"]]
            assert bool(wanted) == ("doratune leaves" in each["warnings"]), each
            assert wanted in each["warnings"]


def test_parameters_of_zero3_are_left_to_peft() -> None:
    model = with_dora(Pair())
    layer = model.base_model.model.first
    for parameter in (layer.base_layer.weight, layer.lora_A["default"].weight):
        parameter.ds_id = 1  # what DeepSpeed puts on the parameters that it partitions
        report = doratune.accelerate(model, quiet=True)
        assert report.layers[0].runs == "pending"
        assert "ZeRO-3" in report.layers[0].remark
        with pytest.warns(UserWarning, match=r"doratune leaves .*first .* to PEFT in calls like this one: .*ZeRO-3"):
            model(torch.randn(3, 24))
        del parameter.ds_id
    assert doratune.accelerate(model, quiet=True).layers[0].runs == "reference"


def test_a_weight_of_another_size_is_treated_as_a_shard() -> None:
    model = with_dora(Pair())
    layer = model.base_model.model.first
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(20))
    report = doratune.accelerate(model, quiet=True)
    assert "lora_magnitude_vector must have shape [40], got [20]: a shard" in report.layers[0].remark


@pytest.mark.parametrize("shape", [(0,), (1024,), (1023, 1), (2048, 1), (64, 32)])
def test_a_part_of_a_4_bit_weight_is_not_made_one_again(shape: tuple[int, ...]) -> None:
    """Other ways to shard leave plain memory in the layer, too, and of another size."""
    model = Pair(64, 32, 16)
    model.first = four_bits(model.first)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model = with_dora(model)
    base = model.base_model.model.first.base_layer
    base.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    report = doratune.accelerate(model, quiet=True)
    assert type(base.weight) is nn.Parameter
    assert "its weight is torch.uint8 in a Linear4bit" in report.layers[0].remark
