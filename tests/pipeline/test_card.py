"""The model card is what huggingface_hub's own classes read, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from typer.testing import CliRunner

import builders
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.cli.app import app
from milo.errors import FormatError
from milo.pipeline.card import GENERATED, inherited_metadata, model_card, save_evaluation

EVALUATION = {
    "text": "wiki.txt",
    "contiguous": {"ppl": 12.25, "tokens": 1000, "window": 512, "stride": 512},
    "sliding": {"ppl": 11.5, "tokens": 1000, "window": 512, "stride": 128},
    "divergence": {"kl": 0.03125, "kl_se": 0.001, "top1": 0.875, "window": 512},
}
REPORT = {
    "recipe": "milo-s1",
    "policy": "dense:8",
    "command": "milo quantize a/b -o out",
    "compressed_weights": 1000,
    "compressed_bytes": 500,
    "bits_per_weight": 4.0,
    "files_bytes": 600,
    "matrices": [{"error": 0.1}, {"error": 0.2}],
}
CONFIG = {"quantization_config": {"plan": {"rounds": 20, "matrices": [{"bits": 3}]}}}


def test_metadata_names_the_source_its_licence_and_the_relation() -> None:
    text = model_card(CONFIG, REPORT, "mistralai/Mixtral-8x7B-v0.1", {"license": "apache-2.0", "language": ["en"]})
    card = ModelCard(text)
    assert card.data.base_model == "mistralai/Mixtral-8x7B-v0.1"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results is None
    assert "milo quantize a/b -o out" in card.text
    assert "0.1500" in card.text
    assert "vLLM: not yet" in card.text


@pytest.mark.parametrize("source", ["/models/mixtral", "./a/b", None])
def test_a_local_source_is_no_base_model_of_the_hub(source: str | None) -> None:
    metadata = ModelCard(model_card(CONFIG, REPORT, source)).data.to_dict()
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata


def test_measured_quality_becomes_eval_results() -> None:
    card = ModelCard(model_card(CONFIG, REPORT, "a/b", evaluation=EVALUATION))
    assert card.data.eval_results is not None
    measured = {result.metric_type: result for result in card.data.eval_results}
    assert measured["perplexity"].metric_value == 12.25
    assert measured["kl_divergence"].metric_value == 0.03125
    assert {result.dataset_name for result in card.data.eval_results} == {"wiki.txt"}
    assert "0.03125 ± 0.00100" in card.text
    assert "87.50%" in card.text


def test_tasks_stand_in_the_card_beside_the_original() -> None:
    row = {"task": "piqa", "part_of": None, "metric": "acc", "value": 0.6, "stderr": 0.01, "original": 0.62}
    row |= {"original_stderr": 0.01, "difference": -0.02, "difference_stderr": 0.004}
    parts = [row, {**row, "task": "mmlu_law", "part_of": "mmlu"}]
    card = ModelCard(model_card(CONFIG, REPORT, "a/b", evaluation={"text": None, "tasks": {"results": parts}}))
    assert "| piqa, acc | 0.6000 ± 0.0100 | 0.6200 ± 0.0100 | -0.0200 ± 0.0040 |" in card.text
    assert "mmlu_law" not in card.text
    assert "None" not in card.text


def test_what_the_sources_card_says_of_its_licence_is_kept(mixtral_folder: Path, tmp_path: Path) -> None:
    source = builders.copied(mixtral_folder, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: mrl\nlicense_link: LICENSE\ntags: [x]\n---\n")
    builders.compress(source, tmp_path / "out", recipe="hqq")
    metadata = metadata_load(tmp_path / "out" / "README.md") or {}
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "mrl"
    assert "x" not in metadata["tags"]


@pytest.mark.parametrize("text", ["no metadata", "---\n: [\n---\n", "---\njust text\n---\n", ""])
def test_a_broken_card_of_the_source_is_no_reason_to_stop(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert inherited_metadata(tmp_path) == {}


def test_saving_an_evaluation_refreshes_the_card(compressed_folder: Path, tmp_path: Path) -> None:
    folder = builders.copied(compressed_folder, tmp_path / "folder")
    save_evaluation(folder, EVALUATION)
    assert json.loads((folder / "milo_eval.json").read_text()) == EVALUATION
    assert CompressedCheckpoint(folder).evaluation == EVALUATION
    assert "12.2500" in (folder / "README.md").read_text()
    edited = (folder / "README.md").read_text().replace(GENERATED, "").replace("12.2500", "my own words")
    (folder / "README.md").write_text(edited)
    save_evaluation(folder, EVALUATION)
    assert (folder / "README.md").read_text() == edited


def test_an_evaluation_is_kept_only_with_the_weights_it_belongs_to(
    mixtral_folder: Path, compressed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="not compressed with MiLo"):
        save_evaluation(mixtral_folder, EVALUATION)
    (tmp_path / "text").write_text("a text")
    refused = CliRunner().invoke(app, ["eval", str(mixtral_folder), "--text", str(tmp_path / "text"), "--save"])
    assert isinstance(refused.exception, FormatError)  # before the model is loaded, let alone judged
    folder = builders.copied(compressed_folder, tmp_path / "folder")
    save_evaluation(folder, EVALUATION)
    builders.compress(mixtral_folder, folder, recipe="hqq", overwrite=True)
    assert CompressedCheckpoint(folder).evaluation is None
