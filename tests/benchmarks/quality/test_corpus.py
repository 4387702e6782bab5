"""What is held out was not trained on, whichever files are found first; code is without its English."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from doratune.benchmarks.quality.corpus import (
    TEST,
    TRAIN,
    VALIDATION,
    CorpusError,
    Document,
    code,
    docstrings,
    documentation,
    long_lines,
    make_domain,
    split_of,
    without_docstrings,
)

from .planted import planted


def test_what_is_held_out_is_not_trained_on_and_near_copies_are_left_out() -> None:
    original = planted("words") + planted("others") + planted("more")
    copies = [
        Document(f"copy of {one.name}", lambda one=one: f"{one.read()}\none more line, of the copy of {one.name} alone")
        for one in original[::2]
    ]
    found = make_domain("planted", [*original, *copies], train_bytes=10**6, held_out_bytes=3000)
    held_out = {line for split in (VALIDATION, TEST) for line in long_lines(found.parts[split].decode())}
    assert len(held_out) > 100
    assert not held_out & long_lines(found.parts[TRAIN].decode())
    assert not long_lines(found.parts[TEST].decode()) & long_lines(found.parts[VALIDATION].decode())
    assert found.leaked == 0.0
    assert found.dropped > 100
    again = make_domain("planted", [*copies, *original][::-1], train_bytes=10**6, held_out_bytes=3000)
    assert again.sha256 == found.sha256, "the order in which files are found does not matter"


def test_a_document_has_one_split_by_its_name_in_both_domains() -> None:
    names = [f"stdlib/{number}.py" for number in range(2000)]
    share = {split: sum(split_of(name) == split for name in names) / len(names) for split in (TRAIN, VALIDATION, TEST)}
    assert share == {
        TRAIN: pytest.approx(0.8, abs=0.03),
        VALIDATION: pytest.approx(0.1, abs=0.03),
        TEST: pytest.approx(0.1, abs=0.03),
    }
    of_code, of_words = {one.name for one in code()}, {one.name for one in documentation()}
    assert len(of_code) > 100
    assert of_code <= of_words, "a module's docstrings and its code fall on the same side"
    assert {"pydoc/assert", "click/METADATA"} <= of_words


def test_code_is_without_its_docstrings() -> None:
    path = Path(json.__file__).parent / "decoder.py"
    words, rest = docstrings(path), without_docstrings(path)
    assert "Decode a JSON document" in words
    assert "def raw_decode" in rest
    assert not long_lines(words) & long_lines(rest)
    assert "# Use speedup if available" in rest, "comments are part of code"


def test_too_little_text_is_refused_with_what_is_lacking() -> None:
    with pytest.raises(CorpusError, match=r"of planted for the train split, and 4000 are needed; choose a smaller"):
        make_domain("planted", planted("words")[:1], train_bytes=10**6, held_out_bytes=4000)
