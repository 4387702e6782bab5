"""Both ways to decode W are compared on layers of the packages themselves; a wrong request is refused."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from doratune.benchmarks.dequantise import bench_dequantise
from doratune.cli import main
from doratune.errors import UsageError


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown kind of layer 'nf5'"):
        bench_dequantise([(64, 64)], ["nf5"])
    result = CliRunner().invoke(main, ["bench", "dequantise", "--shape", "64by64"])
    assert result.exit_code == 2
    assert "give d_out and d_in of W" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(main, ["bench", "dequantise"])
    assert result.exit_code == 2
    assert "needs a GPU" in result.output
