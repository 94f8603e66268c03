"""The kernels' benchmarks from end to end on a CPU at toy size, with a stand-in for Humming; figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import builders

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAND_IN = Path(__file__).parent / "humming_stand_in"
PEERS = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, glue, moe, linear

x, weights = torch.randn(7, 2 * 1500), torch.rand(3, 2)
gate, up = x.chunk(2, -1)
torch.testing.assert_close(glue.silu_and_mul(x), torch.nn.functional.silu(gate) * up)
place = torch.tensor([[6, 0], [1, 1], [3, 5]], dtype=torch.int32)
torch.testing.assert_close(glue.weighted_sum(x, place, weights), (x[place.long()] * weights[..., None]).sum(1))

common = ["--device", "cpu", "--peers", "bf16", "humming_w3", "humming_w4"]
moe.main([*common, "--shapes", "tiny", "--tokens", "5", "--routing", "zipf", "--out", sys.argv[3] + "/moe.json"])
linear.main([*common, "--shapes", "96x128", "--tokens", "3", "--ranks", "16", "--out", sys.argv[3] + "/linear.json"])
"""


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import first_use
        import humming_peer
        import moe
        import roofline
        import synthetic
        import timing

        modules = (first_use, humming_peer, moe, roofline, synthetic, timing)
        yield SimpleNamespace(**{module.__name__: module for module in modules})


def test_peers_are_timed_beside_ours(tmp_path: Path) -> None:
    """Triton's interpreter is chosen by a variable when a kernel is defined: hence a process of its own."""
    pytest.importorskip("triton")
    environment = {**builders.child_environment(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PEERS, BENCHMARKS, STAND_IN, tmp_path]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout, done.stdout
    found = json.loads((tmp_path / "moe.json").read_text())
    assert found["complete"]
    (row,) = found["rows"]
    assert (row["tokens"], row["routing"], row["rank"]) == (5, "zipf", 32)
    for name in ("ours", "ours_rank0", "bf16", "bf16_ffn", "humming_w3", "humming_w3_ffn", "humming_w4", "limit"):
        assert row[f"{name}_us"] > 0, name
    (row,) = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert all(row[f"{name}_us"] > 0 for name in ("ours", "ours_rank0", "bf16", "humming_w3", "humming_w4", "limit"))
    for layer in ("uint3 4x192x64 indexed [8", "uint4 4x64x96 indexed [8", "uint3 1x96x128 dense [2"):
        assert f"compiled {layer}" in done.stdout


def test_a_peer_that_fails_leaves_null(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Humming is not installed here."""
    options = ["--device", "cpu", "--shapes", "tiny", "--tokens", "2", "--peers", "humming_w3"]
    scripts.moe.main([*options, "--out", str(tmp_path / "moe.json")])
    (row,) = json.loads((tmp_path / "moe.json").read_text())["rows"]
    assert row["humming_w3_us"] is row["humming_w3_ffn_us"] is row["bf16_us"] is None
    assert row["ours_us"] > 0
    assert "No module named 'humming'" in capsys.readouterr().out


def test_a_product_that_is_not_the_weights_is_refused(scripts: SimpleNamespace) -> None:
    product = object.__new__(scripts.humming_peer.Product)
    product._sample, x = torch.randn(64, 128), torch.randn(4, 128)
    product.check(x, x @ product._sample.T)
    with pytest.raises(ValueError, match="off by"):
        product.check(x, x.roll(1, 0) @ product._sample.T)
    with pytest.raises(ValueError, match="off by nan"):
        product.check(x, torch.full((4, 64), float("nan")))


def test_official_ranks_are_those_of_the_whole_model(scripts: SimpleNamespace, tmp_path: Path) -> None:
    made: list[tuple[list[int], list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.synthetic, "_layer", lambda shape, first, second, device: made.append((first, second)))
        scripts.synthetic.official_layers(scripts.synthetic.SHAPES["mixtral-8x7b"], 32, torch.device("cpu"))
    down = [rank for _, ranks in made for rank in ranks]
    assert len(made) == 32
    assert down.count(1024) == 9  # 8 by the rule above 9, and one of 2^(7 + 3)
    assert sum(rank == 0 for ranks, _ in made for rank in ranks) > 200
    scripts.moe.main(["--device", "cpu", "--shapes", "tiny", "--tokens", "2", "512", "--official", "--layers", "2",
                      "--out", str(tmp_path / "official.json")])  # fmt: skip
    (row,) = json.loads((tmp_path / "official.json").read_text())["rows"]
    assert row["rank"] == "milo-s2"
    assert min(row["ours_us"], row["ours_rank32_us"], row["ours_rank0_us"]) > 0


def test_touched_bytes_count_each_expert_once(scripts: SimpleNamespace) -> None:
    shape, device = scripts.synthetic.SHAPES["tiny"], torch.device("cpu")
    layer = scripts.synthetic._layer(shape, [0, 16, 40, 1024], [3, 0, 0, 17], device)
    sizes = sum(scripts.synthetic.expert_bytes(matrix) for matrix in layer)
    assert float(sizes.sum()) == sum(matrix.nbytes for matrix in layer)
    assert sizes[3] > sizes[2] > sizes[1]
    ids = torch.tensor([[1, 3], [3, 1]])
    assert scripts.synthetic.touched_bytes([layer], [ids]) == float(sizes[1] + sizes[3])


def test_zipf_routing_is_as_skewed_as_a_real_model(scripts: SimpleNamespace) -> None:
    shape, device = scripts.synthetic.SHAPES["deepseek-moe-16b"], torch.device("cpu")
    torch.manual_seed(0)
    loads = {
        routing: torch.bincount(scripts.synthetic.route(routing, 20_000, shape, device).flatten()).float()
        for routing in scripts.synthetic.ROUTINGS
    }
    assert loads["random"].max() < 1.2 * loads["random"].min()
    assert 9 < loads["zipf"].max() / loads["zipf"].min() < 14
    ids = scripts.synthetic.route("zipf", 100, shape, device)
    assert all(len(row.unique()) == shape.topk for row in ids)


def test_first_use(scripts: SimpleNamespace) -> None:
    found = scripts.first_use.measure("tiny", "cpu", tokens=(1, 3))
    assert found["total_s"] == pytest.approx(sum(v for key, v in found.items() if key != "total_s"))


def test_the_picture_leaves_out_what_was_not_timed(scripts: SimpleNamespace, tmp_path: Path) -> None:
    def row(tokens: int, **more: float | str | None) -> dict[str, object]:
        return {"shape": "s", "tokens": tokens, "rank": 32, "ours_us": 9.0, "bf16_us": None, "limit_us": 4.0, **more}

    result = {"device": "D", "read_tb_s": 3.0, "rows": [row(8), row(1), row(1, routing="zipf"), row(1, shape="t")]}
    assert scripts.roofline.draw([result], tmp_path / "a.png") == ["s, rank 32", "t, rank 32"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    axes = scripts.roofline.Figure().subplots()
    drawn = scripts.roofline._panel(axes, "s", [row(1), row(8)])
    assert list(drawn) == ["MiLo, whole", "limit: bytes / read bandwidth"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    with pytest.raises(ValueError, match="no row"):
        scripts.roofline.draw([result], tmp_path / "b.png", "other")
