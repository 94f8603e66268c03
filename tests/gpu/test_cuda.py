"""The same code on a CUDA device: the solver agrees with the CPU, and compressed models load, run and save there.

Run on a GPU machine with `python -m pytest tests/gpu -m gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import milo
import zoo
from milo.checkpoint.source import Checkpoint
from milo.format.matrix import Encoding
from milo.integrations.transformers.fisher import sensitivities
from milo.integrations.transformers.source import open_source
from milo.integrations.transformers.streamed import streamed_model
from milo.kernels.reference import reconstruct
from milo.modules.matrix import CompressedMatrix
from milo.pipeline.budget import plan_budget
from milo.pipeline.compress import compress_checkpoint
from milo.pipeline.measure_menu import measure_menu
from milo.pipeline.planning import plan_source
from milo.plan.budget import Budget
from milo.plan.recipe import custom_recipe
from milo.solve.stack import solve_stack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Mixtral and its compressed folder, solved on the GPU."""
    root = tmp_path_factory.mktemp("gpu")
    zoo.tiny_model("mixtral").save_pretrained(root / "source")
    source = open_source(str(root / "source"))
    plan = plan_source(source, custom_recipe("milo-s1", source.checkpoint.config, ranks="dense:8+kurtosis:3", rounds=4))
    compress_checkpoint(source.checkpoint, source.inventory, plan, root / "out", devices="cuda:0")
    return root / "source", root / "out"


@pytest.mark.parametrize("ranks", [[0, 0, 0], [4, 0, 17]])
@pytest.mark.parametrize("bits", [3, 8])
def test_solver_on_cuda_is_as_good_as_on_cpu(ranks: list[int], bits: int) -> None:
    weight = torch.randn(3, 200, 160, generator=torch.Generator().manual_seed(1)) * 0.02
    encoding = Encoding(bits=bits)
    on_cpu = solve_stack(weight, ranks, encoding, rounds=5)
    on_gpu = solve_stack(weight.cuda(), ranks, encoding, rounds=5)
    for cpu, gpu, matrix in zip(on_cpu, on_gpu, weight, strict=True):
        assert gpu.error == pytest.approx(cpu.error, rel=0.02)
        rebuilt = reconstruct({k: t.cpu() for k, t in gpu.tensors.items()}, encoding, (200, 160))
        assert ((rebuilt - matrix).norm() / matrix.norm()).item() == pytest.approx(gpu.error, rel=1e-3)


def test_a_weighted_grid_on_cuda_is_as_good_as_on_cpu() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 200, 160, generator=generator) * 0.02
    importance = torch.exp(torch.randn(3, 160, generator=generator))
    for ranks in ([0, 0, 0], [4, 0, 17]):
        encoding = Encoding(3, 64, 6, 6)
        on_cpu = solve_stack(weight, ranks, encoding, "mse", 3, importance=importance)
        on_gpu = solve_stack(weight.cuda(), ranks, encoding, "mse", 3, importance=importance)
        for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
            assert gpu.weighted_error == pytest.approx(cpu.weighted_error, rel=0.02)


def test_a_budget_is_planned_and_carried_out_on_cuda(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(str(folders[0]))
    with streamed_model(source.checkpoint, "cuda:0") as model:
        known = sensitivities(model, source.inventory)
    with streamed_model(source.checkpoint) as model:
        assert known.costs == pytest.approx(sensitivities(model, source.inventory).costs, rel=0.01)
    measured = measure_menu(source, known.importance, device="cuda:0")
    found = plan_budget(source, Budget.parse("4.5bpw"), measured, known, "random")
    done = compress_checkpoint(
        source.checkpoint, source.inventory, found.plan, tmp_path, importance=found.importance, devices="cuda:0"
    )
    assert 0 < done.report["bits_per_weight"] <= 4.5


def test_solver_on_cuda_is_deterministic() -> None:
    weight = torch.randn(4, 128, 192, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    first, second = (solve_stack(weight, [8, 0, 3, 8], Encoding(), rounds=6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_folder_runs_on_cuda(folders: tuple[Path, Path], device_map: str, dtype: torch.dtype) -> None:
    _, folder = folders
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    on_cpu = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(24)[None] % 100
    with torch.no_grad():
        got, want = model(ids.cuda()).logits.float().cpu(), on_cpu(ids).logits
    assert ((got - want).norm() / want.norm()).item() < (0.01 if dtype is torch.float16 else 0.05)
    assert model.generate(ids.cuda(), max_new_tokens=4, do_sample=False).shape == (1, 28)
    assert all(m.released for m in model.modules() if isinstance(m, CompressedMatrix))  # the kernels computed all of it


def test_the_kernels_run_inside_a_compiled_model(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda")
    ids = torch.arange(8, device="cuda")[None] % 100
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, mode="reduce-overhead")
        for _ in range(3):  # the third replays a graph
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(ids, use_cache=False).logits.clone()
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.01


def test_save_from_cuda_is_bit_exact(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = folders
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda").save_pretrained(tmp_path)
    before, after = Checkpoint(folder), Checkpoint(tmp_path)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_compress_on_load_on_cuda_equals_the_folder(folders: tuple[Path, Path]) -> None:
    source, folder = folders
    config = milo.MiloConfig(ranks="dense:8+kurtosis:3", rounds=4)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map="cuda", quantization_config=config
    )
    from_folder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda")
    want = from_folder.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
