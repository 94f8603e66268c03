"""The commands end to end on a tiny model, as a user types them: output, JSON, exit codes, clean failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import builders
import zoo
from milo.cli.app import app
from task_files import write_task_files

MILO = [sys.executable, "-m", "milo.cli.app"]


def milo(*args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `milo ARGS`, check its exit code, return what it printed."""
    done = subprocess.run([*MILO, *map(str, args)], capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with a word tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    zoo.tiny_model("mixtral").save_pretrained(folder)
    builders.word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "text.txt"
    path.write_text(" ".join(f"w{(i * i) % 190 + 1}" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    done = milo("quantize", model, "-o", out, "--ranks", "dense:4+kurtosis:2", "--rounds", "2", "--workers", "1")
    assert re.search(r"about \d+ s on 1 CPU threads, .* of memory", done.stderr)
    assert re.search(r"out: .* in .* s, .*peak memory .*\npredicted: \d+\.\d s, .*iB\n", done.stdout)
    return out


def test_plan_and_files_agree_to_the_byte(model: Path, compressed: Path) -> None:
    plan = json.loads(milo("plan", model, "--ranks", "dense:4+kurtosis:2", "--rounds", "2", "--json").stdout)
    assert plan["prediction"]["seconds"] > 0
    assert plan["prediction"]["host_bytes"] > plan["peak_bytes"] > 0
    files = sum(path.stat().st_size for path in compressed.glob("*.safetensors"))
    assert plan["files_bytes"] == files
    inspected = json.loads(milo("inspect", compressed, "--json").stdout)
    assert inspected["compressed_bytes"] == plan["compressed_bytes"]
    assert inspected["bits_per_weight"] == pytest.approx(8 * plan["compressed_bytes"] / plan["compressed_weights"])
    assert {role["role"] for role in inspected["roles"]} == {"attention", "expert"}
    assert all(0 < role["mean_error"] < 0.5 for role in inspected["roles"])


def test_the_report_keeps_the_command(model: Path, compressed: Path) -> None:
    report = json.loads((compressed / "milo_report.json").read_text())
    options = "--ranks dense:4+kurtosis:2 --rounds 2 --workers 1"
    assert report["command"] == f"milo quantize {model} -o {compressed} {options}"


def test_plan_prints_a_table_that_names_every_kind_of_matrix(model: Path) -> None:
    shown = milo("plan", model, "--recipe", "hqq", "--no-predict").stdout
    assert "model.layers.#.block_sparse_moe.experts.*.w1" in shown
    assert "bits a weight" in shown
    assert "on this machine" not in shown


def test_eval_measures_against_the_recorded_source(model: Path, compressed: Path, text: Path) -> None:
    args = ("--text", text, "--window", "64", "--stride", "16", "--json")
    found = json.loads(milo("eval", compressed, *args).stdout)
    assert found["original"] == str(model)
    assert found["divergence"]["kl"] > 0
    assert len(found["divergence"]["routing"]) == 2
    assert found["contiguous"]["ppl"] > 1
    assert found["sliding"]["stride"] == 16
    itself = json.loads(milo("eval", model, *args).stdout)
    assert itself["divergence"] is None
    assert itself["size"]["bits_per_weight"] is None
    shown = milo("eval", compressed, "--text", text, "--window", "64").stdout
    assert "perplexity" in shown
    assert "same 2 experts, worst layer (model.layers." in shown


def test_eval_runs_tasks_on_a_model_and_its_original(model: Path, compressed: Path, tmp_path: Path) -> None:
    args = ("--tasks", "lambada,arc", "--task-dir", write_task_files(tmp_path), "--limit", "2")
    found = json.loads(milo("eval", compressed, *args, "--json").stdout)
    assert found["contiguous"] is None
    assert found["size"]["bits_per_weight"] < 16
    tasks = found["tasks"]
    assert (tasks["model"], tasks["original"], tasks["limit"]) == (str(compressed), str(model), 2)
    rows = {(row["task"], row["metric"]): row for row in tasks["results"]}
    assert rows["lambada_openai", "perplexity"]["difference"] != 0
    assert [key for key, row in rows.items() if row["in_paper"]] == [("lambada_openai", "acc")]
    shown = milo("eval", compressed, *args).stdout
    assert re.search(r"lambada_openai │ acc \* +│ +0 │ +2 │ +0\.\d{4} ± 0\.\d{4} │", shown), shown
    assert "by lm-eval" in shown


def test_profile_feeds_the_frequency_policy(model: Path, text: Path, tmp_path: Path) -> None:
    refused = milo("plan", model, "--ranks", "frequency:4", code=1)
    assert "milo profile" in refused.stderr
    counts = tmp_path / "counts.json"
    milo("profile", model, "--text", text, "-o", counts)
    tallies = json.loads(counts.read_text())["counts"]
    assert set(tallies) == {f"model.layers.{i}.block_sparse_moe.experts" for i in range(len(tallies))}
    assert all(sum(tally) == 2 * 300 for tally in tallies.values())  # top-2 of 300 tokens
    plan = json.loads(milo("plan", model, "--ranks", "frequency:4", "--counts", counts, "--json").stdout)
    assert plan["policy"] == "frequency:4"


def test_generate_continues_a_prompt(compressed: Path) -> None:
    shown = milo("generate", compressed, "-p", "w1 w2 w3", "--max-new-tokens", "5").stdout
    assert shown.startswith("w1 w2 w3 ")
    assert len(shown.split()) >= 4


def test_version() -> None:
    assert milo("--version").stdout.strip() == f"milo {version('milo-moe')}"


def test_doctor_names_the_kernel_that_runs() -> None:
    found = json.loads(milo("doctor", "--json").stdout)
    assert found["quantizer_registered"]
    assert any(kernel["runs"] and kernel["reason"] for kernel in found["kernels"])
    assert "transformers" in milo("doctor").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("plan", "no-such-folder"), "not a folder"),
        (("plan", "{model}", "--recipe", "best"), "milo-s1"),
        (("plan", "{model}", "--ranks", "thick:3"), "unknown rank policy"),
        (("plan", "{model}", "--bits", "7"), "bits = 7"),
        (("plan", "{model}", "--counts", "nowhere.json"), "nowhere.json"),
        (("inspect", "{model}"), "not compressed with MiLo"),
        (("quantize", "{model}", "-o", "{model}"), "the source itself"),
        (("quantize", "{model}", "-o", "{model}/.."), "not empty"),
        (("quantize", "{model}", "-o", "nowhere", "--devices", "cuda:77"), "cuda:77 is not there"),
        (("eval", "{model}", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_get_one_clear_line(model: Path, args: tuple[str, ...], words: str) -> None:
    failed = milo(*(arg.format(model=model) for arg in args), code=1)
    assert words in failed.stderr
    assert failed.stderr.strip().startswith("error: ")


def test_options_of_tasks_need_tasks() -> None:
    used = CliRunner().invoke(app, ["eval", "somewhere", "--limit", "3"])
    assert used.exit_code == 2
    assert "name some with --tasks" in " ".join(used.stderr.replace("│", " ").split())


def test_ctrl_c_leaves_nothing_that_looks_finished_and_its_command_goes_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*MILO, "quantize", str(model), "-o", str(out), "--ranks", "uniform:8", "--rounds", "100000"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    deadline = time.monotonic() + 120
    while not (out / "milo_journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert not (out / "config.json").exists()
    assert "run again goes on where it stopped" in errors
    assert "unfinished" in milo("inspect", out, code=1).stderr
    other = ("quantize", model, "-o", out, "--recipe", "rtn", "--no-predict")
    assert "--restart to start over" in milo(*other, code=1).stderr
    milo(*other, "--restart")
    assert (out / "config.json").exists()
