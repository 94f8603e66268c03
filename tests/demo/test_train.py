"""A training of three seconds makes a folder like any other model's, and is done only once."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM
from transformers.utils import logging as transformers_logging

from milo.demo import train as train_module
from milo.demo.corpus import stdlib_corpus
from milo.demo.fit import batches, fit, rate_factor
from milo.demo.settings import Settings
from milo.demo.train import train_demo_model
from milo.demo.vocabulary import train_tokenizer
from milo.errors import MiloError
from milo.evaluate import perplexity, tokenize

SMALL = Settings(vocabulary=300, hidden=64, intermediate=64, layers=1, heads=1, experts=4, sequence=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training, and the progress it reported."""
    cache = tmp_path_factory.mktemp("cache")
    reports: list[tuple[float, str]] = []
    folder = train_demo_model(cache / "models", seconds=3, progress=lambda f, m: reports.append((f, m)))
    return folder, reports


@pytest.fixture
def tiny_corpus(monkeypatch):
    """Stands in for the standard library, and the small settings for the real ones."""
    monkeypatch.setattr(train_module, "stdlib_corpus", lambda: ("the quick brown fox\n" * 500, "held out\n"))
    monkeypatch.setattr(train_module, "Settings", lambda: SMALL)


def test_the_folder_loads_like_any_model_and_has_learned_something(trained):
    folder, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenize(AutoTokenizer.from_pretrained(folder), (folder / "heldout.txt").read_text(encoding="utf-8"), 4000)
    assert isinstance(model, MixtralForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.config.output_router_logits
    assert perplexity(model.float(), ids, window=128).ppl < model.config.vocab_size


def test_the_checkpoint_has_shards_with_one_matrix_an_expert(trained):
    folder, _ = trained
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 1
    assert any("experts.7." in name for name in names)
    widths = Settings()
    assert widths.hidden % 64 == widths.intermediate % 64 == 0


def test_the_record_and_the_held_out_text_lie_beside_the_model(trained):
    folder, _ = trained
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] >= 1
    assert record["tokens"] == record["steps"] * Settings().batch * Settings().sequence
    assert 3 <= record["seconds"] < 20
    assert 3_000_000 <= record["parameters"] <= 8_000_000
    assert (folder / "heldout.txt").read_text(encoding="utf-8") == stdlib_corpus()[1]


def test_progress_rises_to_one(trained):
    _, reports = trained
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert any("step" in message for _, message in reports)


def test_nothing_but_the_model_is_left_in_the_cache(trained):
    folder, _ = trained
    assert list(folder.parent.iterdir()) == [folder]


def test_a_trained_model_is_reused_and_other_requests_are_not(tmp_path, tiny_corpus, monkeypatch):
    first = train_demo_model(tmp_path, seconds=0.1)
    other_seed = train_demo_model(tmp_path, seconds=0.1, seed=1)
    assert other_seed != first
    monkeypatch.setattr(train_module, "fit", lambda *_: pytest.fail("trained again"))
    assert train_demo_model(tmp_path, seconds=0.1) == first
    with pytest.raises(pytest.fail.Exception):
        train_demo_model(tmp_path, seconds=0.2)


def test_the_losing_one_of_two_trainings_takes_the_winners_model(tmp_path, tiny_corpus, monkeypatch):
    def fit_while_another_finishes(*args):
        monkeypatch.setattr(train_module, "fit", fit)
        train_demo_model(tmp_path, seconds=0.1)
        return fit(*args)

    monkeypatch.setattr(train_module, "fit", fit_while_another_finishes)
    folder = train_demo_model(tmp_path, seconds=0.1)
    assert list(tmp_path.iterdir()) == [folder]
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == SMALL.vocabulary


def test_an_interrupted_training_leaves_nothing(tmp_path, tiny_corpus, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_demo_model(tmp_path, seconds=0.1)
    assert not list(tmp_path.iterdir())


def test_the_callers_random_state_and_progress_bars_stay(tmp_path, tiny_corpus):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_demo_model(tmp_path, seconds=0.1)
    assert torch.equal(torch.rand(3), expected)
    assert transformers_logging.is_progress_bar_enabled()


def test_bad_arguments_are_named(tmp_path, tiny_corpus):
    with pytest.raises(ValueError, match="seconds"):
        train_demo_model(tmp_path, seconds=0)
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(MiloError, match="file"):
        train_demo_model(file, seconds=0.1)


def test_a_diverging_training_is_refused(tmp_path, tiny_corpus, monkeypatch):
    wild = dataclasses.replace(SMALL, rate=math.inf)
    monkeypatch.setattr(train_module, "Settings", lambda: wild)
    with pytest.raises(MiloError, match="diverged"):
        train_demo_model(tmp_path, seconds=0.5)


def test_batches_cover_an_epoch_once_and_differ_by_epoch_and_seed():
    ids = torch.arange(8 * 5 + 3)
    stream = batches(ids, sequence=5, batch=4, seed=0)
    epochs = [torch.cat([next(stream), next(stream)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(40))
        assert (epoch.diff(dim=1) == 1).all()
    assert not torch.equal(*epochs)
    assert torch.equal(next(batches(ids, 5, 4, seed=0)), epochs[0][:4])
    assert not torch.equal(next(batches(ids, 5, 4, seed=1)), epochs[0][:4])


def test_rates_rise_then_fall():
    factors = [rate_factor(i / 1000, SMALL) for i in range(1001)]
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == pytest.approx(1.0)
    assert 0 < factors[0] <= 0.02
    assert factors[-1] == pytest.approx(SMALL.final)


def test_the_tokenizer_restores_every_text():
    tokenizer = train_tokenizer("def f(x):\n    return x\n" * 20, 300)
    for text in ("def größer(x):\n\treturn  x\r\n", "日本 🙂", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
