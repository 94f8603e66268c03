"""The tasks that the paper reports, and short names for tasks.

The suite `paper` (arXiv 2504.02658 Table 3; metrics and shots as in the official evaluation script):

| task | shots | metric |
|---|---|---|
| `hellaswag` | 0 | `acc_norm`: log-likelihood divided by the answer's length in bytes |
| `lambada_openai` | 0 | `acc`: the last word is the greedy continuation |
| `piqa` | 0 | `acc`: log-likelihood as it is |
| `mmlu` | 5 | `acc`, over the questions of all 57 subjects |
| `triviaqa` | 5 | `exact_match`, after stripping case, punctuation and blanks |
"""

from __future__ import annotations

from dataclasses import dataclass

from milo.errors import MiloError


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper's suite: the metric it reports, lm-eval's name of the answer filter, examples shown."""

    metric: str
    filter: str
    shots: int


PAPER = {
    "hellaswag": PaperTask("acc_norm", "none", 0),
    "lambada_openai": PaperTask("acc", "none", 0),
    "piqa": PaperTask("acc", "none", 0),
    "mmlu": PaperTask("acc", "none", 5),
    "triviaqa": PaperTask("exact_match", "remove_whitespace", 5),
}
# Short names; `lambada` alone would be two variants to lm-eval, of which the paper takes OpenAI's.
ALIASES = {"paper": tuple(PAPER), "lambada": ("lambada_openai",), "arc": ("arc_easy", "arc_challenge")}


def reported_by_paper(task: str, metric: str, answer_filter: str) -> bool:
    """Whether the paper's tables have this figure."""
    chosen = PAPER.get(task)
    return chosen is not None and (chosen.metric, chosen.filter) == (metric, answer_filter)


def task_names(wanted: str) -> list[str]:
    """`paper,arc_easy` to lm-eval's names, aliases resolved, each once."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise MiloError("--tasks names no task; try --tasks paper")
    return list(dict.fromkeys(real for name in names for real in ALIASES.get(name, (name,))))
