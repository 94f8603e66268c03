"""Texts and tokens: what is read, what is added, and what the errors say."""

from __future__ import annotations

import builtins
import logging
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from milo.errors import MiloError
from milo.evaluate import load_text, tokenize

LETTERS = {"[BOS]": 0, "[EOS]": 1, "a": 2, "b": 3, "c": 4}


def letter_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token a letter; ``template`` says which special tokens stand around a text by default."""
    core = Tokenizer(models.WordLevel(LETTERS, unk_token="c"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("[BOS]", 0), ("[EOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[BOS]", eos_token="[EOS]", model_max_length=4)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", [2, 3, 2]),
        ("[BOS] $A", [0, 2, 3, 2]),
        ("[BOS] $A [EOS]", [0, 2, 3, 2]),
        ("$A [EOS]", [2, 3, 2]),
    ],
)
def test_only_a_default_bos_is_added(template, expected):
    ids = tokenize(letter_tokenizer(template), "aba")
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


def test_long_texts_draw_no_warning_and_are_not_cut(caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        assert len(tokenize(letter_tokenizer("$A"), "ab" * 50)) == 100
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_max_tokens_keeps_the_beginning():
    assert tokenize(letter_tokenizer("[BOS] $A"), "ab" * 50, max_tokens=3).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="max_tokens"):
        tokenize(letter_tokenizer("$A"), "ab", max_tokens=0)


def test_empty_text_is_refused():
    with pytest.raises(MiloError, match="empty"):
        tokenize(letter_tokenizer("[BOS] $A"), "")


def test_a_file_is_read_as_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("größer\n", encoding="utf-8")
    assert load_text(path) == ("größer\n", "text.txt")
    assert load_text(str(path)) == load_text(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(MiloError, match=r"missing\.txt"):
        load_text(tmp_path / "missing.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größer".encode("latin-1"))
    with pytest.raises(MiloError, match=r"latin\.txt is not UTF-8"):
        load_text(latin)


def test_without_datasets_the_remedies_are_named(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(MiloError, match=r"milo-moe\[eval\].*--text FILE"):
        load_text()


def fake_datasets(load_dataset) -> types.ModuleType:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_wikitext_rows_are_joined_by_blank_lines(monkeypatch):
    def load_dataset(path, name, split):
        assert (name, split) == ("wikitext-2-raw-v1", "test")
        return {"text": ["", " = Title = \n", " Words .\n"]}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    assert load_text() == ("\n\n = Title = \n\n\n Words .\n", "WikiText-2 test")


def test_without_network_the_remedy_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    with pytest.raises(MiloError, match=r"no route to host.*--text FILE"):
        load_text()
