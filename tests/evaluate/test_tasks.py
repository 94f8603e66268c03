"""Tasks are lm-eval's, to the digit: only where models and documents come from is ours."""

from __future__ import annotations

import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest

from judged import tiny_mixtral
from milo.errors import MiloError
from milo.evaluate.folder import load_model, load_tokenizer
from milo.evaluate.scores import compare, read_scores
from milo.evaluate.suite import task_names
from milo.evaluate.tasks import Tasks, evaluate_tasks, load_tasks, run_tasks
from task_files import HUB_ROWS, LAMBADA, letters, write_piqa, write_task_files

SHARED_TASKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"
PAPER_DEFINITIONS = ("hellaswag", "lambada", "piqa", "mmlu/default", "triviaqa")


@pytest.fixture(autouse=True)
def _no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval adds what `pip list`, `lscpu` and the like print to its results: seconds a run, and nothing to test."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(task_dir: Path) -> Tasks:
    return load_tasks(task_names("lambada,piqa,arc"), task_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("tasks") / "model", seed=0)


def _save(folder: Path, seed: int) -> Path:
    tiny_mixtral(seed, max_position_embeddings=1024).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def plain_hf(folder: Path, tasks: Tasks, limit: int | None = None) -> dict[str, Any]:
    """lm-eval alone: it loads the folder itself."""
    return lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder)},
        tasks=list(tasks.loaded["tasks"].values()),
        batch_size=4,
        device="cpu",
        limit=limit,
        bootstrap_iters=50,
        task_manager=tasks.manager,
    )


def assert_equal_to_plain_hf(folder: Path, tasks: Tasks, limit: int | None = None) -> None:
    theirs = plain_hf(folder, tasks, limit)
    ours = run_tasks(load_model(folder), load_tokenizer(folder), tasks, limit=limit, batch=4, bootstrap=50)
    assert ours["results"] == theirs["results"]
    for name, samples in theirs["samples"].items():
        assert samples
        assert [s["arguments"] for s in ours["samples"][name]] == [s["arguments"] for s in samples]
        assert [s["resps"] for s in ours["samples"][name]] == [s["resps"] for s in samples]


def test_figures_equal_those_of_lm_evals_own_hf_path(folder: Path, tasks: Tasks) -> None:
    assert_equal_to_plain_hf(folder, tasks)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_TASKS.is_dir(), reason="needs ../shared/data/tasks")
def test_figures_of_a_real_model_equal_those_of_lm_evals_own_hf_path(trained_mixtral: Path) -> None:
    assert_equal_to_plain_hf(trained_mixtral, load_tasks(task_names("lambada,piqa,arc"), SHARED_TASKS), limit=4)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_documents_read_from_files_render_as_those_of_the_hub(name: str, task_dir: Path) -> None:
    """The installed definition over the hub's rows, against ours over the published files, field by field."""
    local = load_tasks([name], task_dir)
    ours = local.loaded["tasks"][name]
    manager = lm_eval.tasks.TaskManager(include_path=local.manager.include_path, include_defaults=False)
    rows = datasets.Dataset.from_list(HUB_ROWS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: dict.fromkeys(("train", "validation", "test"), rows))
        theirs = manager.load([name])["tasks"][name]

    differing = {key for key in vars(theirs.config) if vars(theirs.config)[key] != vars(ours.config)[key]}
    assert differing <= {"custom_dataset", "training_split", "validation_split", "fewshot_config", "metadata"}
    assert ours.config.metadata["version"] == theirs.config.metadata["version"]
    assert list(ours.eval_docs) == list(theirs.eval_docs) == HUB_ROWS[name]
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        for render in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            if render != "doc_to_choice" or ours.OUTPUT_TYPE == "multiple_choice":
                assert getattr(ours, render)(mine) == getattr(theirs, render)(other)
    for task in (ours, theirs):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
    assert ours.aggregation() == theirs.aggregation()


def test_prompts_are_the_published_ones(tasks: Tasks) -> None:
    lambada, arc = tasks.loaded["tasks"]["lambada_openai"], tasks.loaded["tasks"]["arc_easy"]
    assert lambada.doc_to_text(LAMBADA[1]) == 'He said "go"\n\nand she would'
    assert lambada.doc_to_target(LAMBADA[1]) == " go"
    second = list(arc.eval_docs)[1]
    assert arc.doc_to_text(second) == "Question: How many\u2028legs has a dog?\nAnswer:"
    assert arc.doc_to_choice(second)[int(arc.doc_to_target(second))] == "four"


def test_nothing_looks_for_a_network(folder: Path, task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        attempts.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    result = evaluate_tasks(str(folder), load_tasks(task_names("piqa,arc_easy"), task_dir), batch=4)
    assert attempts == []
    assert {(row.task, row.metric) for row in result.results} == {
        (task, metric) for task in ("piqa", "arc_easy") for metric in ("acc", "acc_norm")
    }


def test_a_model_stands_beside_its_original(folder: Path, tasks: Tasks, tmp_path: Path) -> None:
    other = _save(tmp_path / "other", seed=1)
    result = evaluate_tasks(str(folder), tasks, original=str(other), limit=2, batch=4)
    swapped = evaluate_tasks(str(other), tasks, original=str(folder), limit=2, batch=4)
    assert [row.task for row in result.results[::2]] == ["lambada_openai", "piqa", "arc_easy", "arc_challenge"]
    for row, back in zip(result.results, swapped.results, strict=True):
        assert row.documents == 2
        assert (row.value, row.stderr) == (back.original, back.original_stderr)
        assert row.difference == -back.difference
        assert row.difference_stderr == back.difference_stderr
    assert [row.task for row in result.results if row.in_paper] == ["lambada_openai", "piqa"]
    assert result.results[0].difference != 0


def test_a_model_does_not_differ_from_itself(folder: Path, tasks: Tasks) -> None:
    results = run_tasks(load_model(folder), load_tokenizer(folder), tasks, batch=4)
    scores = read_scores(results, tasks.loaded)
    assert all((row.difference, row.difference_stderr) == (0, 0) for row in compare(scores, scores))


def _index_of(*folders: str) -> Any:
    """lm-eval's task manager over some of its definitions: reading all 14,000 takes several seconds."""
    root = Path(lm_eval.tasks.__file__).parent
    paths = [root / folder for folder in folders]
    return partial(lm_eval.tasks.TaskManager, include_path=paths, include_defaults=False)


@pytest.mark.slow
def test_the_paper_suite_has_its_shots_and_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All five tasks as they come from the hub, over stand-ins for its data sets; MMLU is a group of 57 tasks."""
    rows = {
        "Rowan/hellaswag": {
            "ind": 1, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "ctx": "A man cooks. he",
            "endings": ["eats", "runs away", "sings", "sits"], "source_id": "x", "split": "val",
            "split_type": "indomain", "label": "2",
        },
        "EleutherAI/lambada_openai": LAMBADA[0],
        "baber/piqa": HUB_ROWS["piqa"][0],
        "cais/mmlu": {"question": "One and one?", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 1},
        "mandarjoshi/trivia_qa": {"question": "Who?", "answer": {"aliases": ["me"], "value": "me"}},
    }  # fmt: skip

    def load_dataset(path: str, **_: Any) -> dict[str, datasets.Dataset]:
        few = datasets.Dataset.from_list([rows[path] | {"number": i} for i in range(6)])
        return dict.fromkeys(("train", "validation", "test", "dev"), few)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", _index_of("hellaswag", "lambada", "piqa", "mmlu/default", "triviaqa")
    )
    suite = load_tasks(task_names("paper"))
    model = load_model(folder)
    scores = read_scores(run_tasks(model, load_tokenizer(folder), suite, limit=1, batch=16), suite.loaded)
    reported = {row.task: row for row in compare(scores, scores) if row.in_paper}
    assert {name: (row.metric, row.shots) for name, row in reported.items()} == {
        "mmlu": ("acc", 5),
        "hellaswag": ("acc_norm", 0),
        "lambada_openai": ("acc", 0),
        "piqa": ("acc", 0),
        "triviaqa": ("exact_match", 5),
    }
    assert reported["mmlu"].documents == 57
    assert reported["mmlu"].difference_stderr == 0  # over the documents of all subjects
    assert [row.part_of for row in reported.values()] == [None] * 5
    assert sum(score.part_of == "mmlu_stem" for score in scores) > 10


def test_names_are_lm_evals_but_for_three() -> None:
    assert task_names("paper")[:2] == ["hellaswag", "lambada_openai"]
    assert task_names("arc, lambada,arc_easy") == ["arc_easy", "arc_challenge", "lambada_openai"]
    with pytest.raises(MiloError, match="names no task"):
        task_names(" , ")


def test_few_shot_examples_come_from_the_training_file(folder: Path, tmp_path: Path) -> None:
    write_task_files(tmp_path)
    with pytest.raises(MiloError, match=r"few-shot piqa draws its examples from train\.jsonl"):
        load_tasks(["piqa"], tmp_path, num_fewshot=2)
    write_piqa(tmp_path / "piqa", "train")
    tasks = load_tasks(["piqa"], tmp_path, num_fewshot=2)
    results = run_tasks(load_model(folder), load_tokenizer(folder), tasks, limit=1, batch=4)
    assert results["n-shot"] == {"piqa": 2}
    prompt, _ = results["samples"]["piqa"][0]["arguments"][0]
    assert prompt.count("Question: ") == 3


def _refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", _index_of("piqa", "lambada"))
        with pytest.raises(MiloError, match="no task 'piqua'; did you mean piqa"):
            load_tasks(["piqua"])
        patch.setattr(datasets, "load_dataset", _refuse)
        with pytest.raises(MiloError, match=r"documents of piqa \(ConnectionError: no route\).*--task-dir"):
            load_tasks(["piqa"])
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(MiloError, match=r"milo-moe\[eval\]"):
            load_tasks(["piqa"])
    with pytest.raises(MiloError, match="nowhere is not a folder"):
        load_tasks(["piqa"], tmp_path / "nowhere")
    with pytest.raises(MiloError, match=r"hellaswag cannot be read from local files"):
        load_tasks(["hellaswag"], tmp_path)
    with pytest.raises(MiloError, match=r"arc_easy needs ARC-Easy-Test\.jsonl in"):
        load_tasks(["arc_easy"], tmp_path)
    write_task_files(tmp_path)
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(MiloError, match=r"valid\.jsonl has 3 lines, but valid-labels\.lst has 1"):
        load_tasks(["piqa"], tmp_path)
    for content, says in (("{", "one JSON object a line"), ("", "empty"), ('{"words": 1}\n', "not as published")):
        (tmp_path / "lambada" / "lambada_test.jsonl").write_text(content)
        with pytest.raises(MiloError, match=says):
            load_tasks(["lambada_openai"], tmp_path)


def test_a_tokenizer_without_an_end_is_refused(folder: Path, tasks: Tasks) -> None:
    tokenizer = letters()
    tokenizer.eos_token = None
    with pytest.raises(MiloError, match="neither a BOS nor an EOS"):
        run_tasks(load_model(folder), tokenizer, tasks)


def test_files_may_lie_in_the_folder_itself(task_dir: Path) -> None:
    flat = load_tasks(["piqa"], task_dir / "piqa")
    assert len(list(flat.loaded["tasks"]["piqa"].eval_docs)) == 3
