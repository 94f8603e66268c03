"""Every command in the documentation is run here, verbatim, on tiny models; or it stands in `NOT_RUN` with the reason.

The names that pages use (MODEL, OUT, FILE, ...) are real folders and files of the working folder, so nothing has to
be replaced in a command. A page's commands run in their order.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, cast

import click
import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import builders
from judged import tiny_mixtral
from milo.cli.app import app
from task_files import write_task_files

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("milo", "python", "python3", "pip")
# Begin of a command: why it is not run here. MiLo's own are still parsed.
NOT_RUN = {
    "python3 -m venv": "CI runs the test command; the demo has tests of its own",
    "pip install": "network",
    "milo demo": "a minute of training; tests/demo has it in pieces",
    "milo eval mixtral-milo --tasks paper": "network; tests/evaluate/test_tasks.py has the suite's names and settings",
    "milo serve mixtral-milo": "vLLM and a GPU; tests/gpu/test_server.py has both",
    "milo push": "network; tests/checkpoint/test_publish.py has a hub",
    "python benchmarks": "hours; test_the_benchmarks_exist",
}


def commands(page: Path) -> list[str]:
    """Commands of a page: lines of bash blocks, and indented lines that begin with a program; comments are dropped."""
    found = []
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    indented = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}((?:%s) .*(?:\n {12,}\S.*)*)" % "|".join(PROGRAMS), indented, re.M)  # noqa: UP031
    for line in lines:
        command = re.sub(r"\s{2,}#.*|^#.*", "", line).strip()
        if command:
            found.append(re.sub(r"\s*\n\s*", " ", command))
    return found


def synopsis(command: str) -> bool:
    """Whether it describes a command (`[--json]`) instead of being one."""
    return "[" in command


def _group() -> click.Group:
    return cast(click.Group, typer.main.get_command(app))  # typer brings its own click, which is the same to us


def _parse(arguments: list[str]) -> None:
    """Parse a `milo` command without running it; wrong options and missing arguments fail."""
    command = _group().commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Path:
    """A working folder in which the pages' names exist."""
    for name in ("MODEL", "mistralai/Mixtral-8x7B-v0.1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny)
    for name in ("FILE", "wiki.txt", "wiki.test.hf_join.txt"):
        (tmp_path / name).write_text(" ".join(f"w{(i * i) % 190 + 1}" for i in range(400)))
    write_task_files(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("docs") / "tiny"
    # Rows long enough for the budgets that pages show, and positions for their windows.
    size = {"vocab_size": 200, "hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 4096}
    tiny_mixtral(0, **size).save_pretrained(found)
    builders.word_tokenizer(found)
    return found


def _excused(command: str) -> bool:
    return command.startswith(tuple(NOT_RUN))


def _runnable(page: Path) -> list[str]:
    return [c for c in commands(page) if c.startswith("milo ") and not synopsis(c) and not _excused(c)]


@pytest.mark.parametrize("page", [page for page in PAGES if _runnable(page)], ids=lambda page: page.name)
def test_commands_run(page: Path, folder: Path) -> None:
    if not any("-o OUT" in command for command in _runnable(page)):
        builders.compress(folder / "MODEL", folder / "OUT", recipe="hqq")  # the page is about a compressed folder
    for command in _runnable(page):
        # The prediction alone would take two seconds a command; tests/pipeline/test_predict.py has it.
        quick = ["--no-predict"] if command.startswith(("milo plan", "milo quantize")) else []
        done = CliRunner().invoke(app, [*shlex.split(command)[1:], *quick])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_others_are_excused_and_milos_own_parse(page: Path) -> None:
    for command in commands(page):
        if synopsis(command):
            continue
        assert command.startswith("milo ") or _excused(command), f"{page.name}: nothing runs `{command}`"
        if command.startswith("milo "):
            _parse(shlex.split(command)[1:])


def test_no_excuse_is_idle() -> None:
    everything = [command for page in PAGES for command in commands(page)]
    for begin in NOT_RUN:
        assert any(command.startswith(begin) for command in everything), begin


def test_the_command_page_names_every_option_and_no_other() -> None:
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## milo (\w+)$(.*?)(?=^## |\Z)", text, re.M | re.S))
    shared = {
        f"[{kind} options]": set(re.findall(r"--[a-z][a-z-]*", " ".join(re.findall(r"^\| `.*", table, re.M))))
        for kind in ("recipe", "budget")
        for table in [text.partition(f"### {kind.title()} options")[2].partition("## ")[0]]
    }
    for name, command in _group().commands.items():
        shown = " ".join(re.findall(r"^ {4}milo .*(?:\n {12,}\S.*)*", sections[name], re.M))
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown))
        named |= set().union(*(options for kind, options in shared.items() if kind in shown))
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        spellings = [{*option.opts, *option.secondary_opts} for option in options]
        for spelling in spellings:
            assert named & spelling or spelling == {"--help"}, f"milo {name} {spelling} is not in docs/cli.md"
        known = set().union(*spellings)
        assert named <= known, f"milo {name} has no {named - known}"


def test_the_benchmarks_exist() -> None:
    for command in (command for page in PAGES for command in commands(page)):
        if command.startswith("python benchmarks"):
            assert (ROOT / shlex.split(command)[1]).exists(), command


@pytest.mark.parametrize("name", ["index.md", "serving.md", "transformers.md"])
def test_python_blocks_run(name: str, folder: Path) -> None:
    """The Python that shows how to load and compress, in one process as a reader would type it."""
    builders.compress(folder / "MODEL", folder / "OUT", recipe="hqq")
    (folder / "ORIGINAL").symlink_to(folder / "MODEL")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text("utf-8"), re.M | re.S):
        if "load_compressed(module" in block:  # needs a model's own code: tests/integrations/test_loading.py
            continue
        if "OpenAI(" in block:  # needs a server: tests/gpu/test_server.py
            continue
        if "compress_model(model" in block:
            names["model"] = AutoModelForCausalLM.from_pretrained("ORIGINAL")
        exec(compile(block, name, "exec"), names)
