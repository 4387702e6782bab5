"""What README, CONTRIBUTING and the site tell a reader to type works: each code block runs on the CPU, or says why not
and is checked as far as it can be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from sybil import Document

from . import pages

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the pages where there is a GPU")


@no_gpu
@pytest.mark.parametrize("page", pages.PAGES)
def test_the_code_blocks_of_a_page_do_what_it_says(page: str, stage: pages.Stage) -> None:
    stage.play(pages.read(page))


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_code_block_is_fenced(page: str) -> None:
    tokens = MarkdownIt().parse((pages.ROOT / page).read_text(encoding="utf-8"))
    assert [token.content for token in tokens if token.type == "code_block"] == []


def page_of(text: str, folder: Path) -> Document:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return pages.read(path)


GOOD = """
<!-- file: numbers.json -->
```json
[1, 2]
```

```python
import json
print(sum(json.load(open("numbers.json"))))
```

<!-- prints -->
```text
3
```

```console
$ echo one; echo two
o…
two
$ cat numbers.json
[1, 2]
```

<!-- not run: needs a GPU that it does not have -->
```bash
doratune tune --model llama-8b --device cuda:1 --store somewhere.sqlite &
make test MODEL=x
```
"""


@no_gpu
def test_a_page_that_says_what_happens_passes(stage: pages.Stage, tmp_path: Path) -> None:
    stage.play(page_of(GOOD, tmp_path))


@no_gpu
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("\n3\n", "\n4\n", "page.md:13: expected"),
        ("o…\ntwo", "o…\nthree", "expected"),
        ("$ cat", "$ cats", "cats"),
        ("import json", "import jason", "jason"),
        ("--device cuda:1", "--devise cuda:1", "--devise"),
        ("doratune tune", "doratune tuna", "no command 'tuna'"),
        ("make test", "make tests", "tests"),
        ("not run: needs a GPU that it does not have", "not run", "needs a reason"),
        ("<!-- prints", "<!-- print", "unknown comment"),
        ("```json", "```", "names its language"),
        ("file: numbers", "file: other", "numbers.json"),
    ],
)
def test_a_page_that_is_wrong_fails(right: str, wrong: str, message: str, stage: pages.Stage, tmp_path: Path) -> None:
    assert right in GOOD
    with pytest.raises(AssertionError, match=message):
        stage.play(page_of(GOOD.replace(right, wrong), tmp_path))
