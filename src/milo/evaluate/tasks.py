r"""Zero- and few-shot tasks through lm-evaluation-harness.

lm-eval builds every prompt, scores every answer and computes every metric; this file chooses the tasks, hands it a
model loaded like any other here, and puts a compressed model beside its original.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from milo.checkpoint.hub import find_model
from milo.errors import MiloError
from milo.evaluate.folder import find_original, load_model, load_tokenizer
from milo.evaluate.local_tasks import LOCAL_TASKS, local_definitions
from milo.evaluate.scores import Score, TaskEvaluation, compare, leaf_tasks, read_scores
from milo.evaluate.suite import ALIASES, PAPER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval draws 100,000 bootstrap samples for the standard error of LAMBADA's perplexity, in pure Python (minutes).
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Tasks:
    """Tasks ready to run, with their documents; from `load_tasks`."""

    loaded: dict[str, Any] = field(repr=False)
    source: str
    num_fewshot: int | None
    manager: Any = field(repr=False)


def load_tasks(names: list[str], task_dir: Path | None = None, num_fewshot: int | None = None) -> Tasks:
    """Reads the definitions and documents of tasks.

    Args:
        names: lm-eval tasks, groups or tags (from `task_names`).
        task_dir: read the documents from published files there, without any network; see `local_tasks`.
        num_fewshot: examples before each document; None takes the paper's number for its tasks, lm-eval's otherwise.

    Raises:
        MiloError: lm-eval is not installed, a name is unknown, or the documents cannot be had.
    """
    try:
        from lm_eval import tasks as definitions
    except ImportError as error:
        raise MiloError("tasks need lm-eval: pip install 'milo-moe[eval]'") from error
    if task_dir is not None:
        members = local_definitions(names, task_dir, num_fewshot)
        root = Path(definitions.__file__).parent
        folders = sorted({root / LOCAL_TASKS[name].subfolder for name in names})
        manager = definitions.TaskManager(include_path=folders, include_defaults=False)
        with _quiet("lm_eval"):
            loaded = manager.load([{"group": "local files", "task": members}])
        loaded = {"tasks": loaded["tasks"], "groups": {}, "group_map": {}}
    else:
        manager = definitions.TaskManager()
        for name in names:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, [*ALIASES, *manager.all_tasks], 3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise MiloError(f"lm-eval has no task {name!r}{hint}")
        try:
            with _quiet("lm_eval"):
                loaded = manager.load(names)
        # Whatever `datasets` raises for a missing network, a moved data set, ...
        except Exception as error:
            raise MiloError(
                f"could not get the documents of {', '.join(names)} ({type(error).__name__}: {error}). "
                f"Without a network give local files: --task-dir FOLDER (for {', '.join(LOCAL_TASKS)})"
            ) from error
    _apply_paper_shots(loaded)
    return Tasks(loaded, f"files in {task_dir}" if task_dir else "Hugging Face hub", num_fewshot, manager)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch: int = 16,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, Any]:
    """Judges one model: what `lm_eval.simple_evaluate` returns, every document's answers included.

    Args:
        model: any causal LM, compressed or not; it stays where it is.
        tokenizer: the model's.
        tasks: from `load_tasks`; they may be run with several models.
        limit: only the first documents of each task.
        batch: documents run together. The last digits of log-likelihoods depend on it, as matrix products do.
        bootstrap: draws for standard errors that have no formula.

    Raises:
        MiloError: the tokenizer has neither a BOS nor an EOS token, one of which lm-eval puts before the first word.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise MiloError("the tokenizer has neither a BOS nor an EOS token, of which lm-eval needs one")
    parts = {child for children in tasks.loaded["group_map"].values() for child in children}
    every = {**tasks.loaded["groups"], **tasks.loaded["tasks"]}
    with _quiet("lm_eval"):  # it warns that a model in memory stays where it is
        wrapped = HFLM(pretrained=cast(Any, model), tokenizer=cast(Any, tokenizer), batch_size=batch)
    with _quiet("lm_eval.evaluator"), contextlib.redirect_stdout(sys.stderr):  # the bootstrap prints
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=[task for name, task in every.items() if name not in parts],
            num_fewshot=tasks.num_fewshot,
            limit=limit,
            bootstrap_iters=bootstrap,
            task_manager=tasks.manager,
        )
    return cast(dict[str, Any], results)  # None only on the other ranks of a distributed run


def evaluate_tasks(
    folder: str,
    tasks: Tasks,
    *,
    original: str | None = None,
    limit: int | None = None,
    batch: int = 16,
    dtype: str = "auto",
    device: str = "cpu",
) -> TaskEvaluation:
    """Judges a model folder and its original on tasks, one model in memory at a time.

    Args:
        folder: a compressed or original model.
        tasks: from `load_tasks`.
        original: the model to compare with; None takes a compressed folder's recorded source if it still exists.
        limit: only the first documents of each task.
        batch: documents run together.
        dtype: compute dtype of both models.
        device: where they run.

    Raises:
        MiloError: a folder cannot be used.
    """
    path = find_model(folder)
    original = find_original(path, original)

    def judge(which: Path) -> list[Score]:
        model = load_model(which, dtype, device)
        return read_scores(run_tasks(model, load_tokenizer(which), tasks, limit=limit, batch=batch), tasks.loaded)

    scores = judge(path)
    originals = judge(find_model(original)) if original is not None else None
    return TaskEvaluation(
        model=folder,
        original=original,
        source=tasks.source,
        limit=limit,
        batch=batch,
        lm_eval=version("lm_eval"),
        results=compare(scores, originals),
    )


def _apply_paper_shots(loaded: dict[str, Any]) -> None:
    """Sets the paper's number of examples where the definition leaves it open."""
    for name, chosen in PAPER.items():
        if chosen.shots and (name in loaded["groups"] or name in loaded["tasks"]):
            for leaf in leaf_tasks(name, loaded):
                task = loaded["tasks"][leaf]
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=chosen.shots)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keeps a logger's warnings back."""
    quiet = logging.getLogger(logger)
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quiet.setLevel(level)
