"""The code blocks of the documentation that need a GPU do what the page says, and so does all Python on the pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sybil")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from ..docs import pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_code_blocks_of_a_page_do_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.Stage.set(tmp_path, monkeypatch, gpu=True).play(pages.read(page))
