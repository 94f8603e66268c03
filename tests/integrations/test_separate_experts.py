"""Experts as a list of linears: DeepSeek-MoE's own modelling code, for which transformers has no class.

Its checkpoints are compressed from tensor names alone (`tests/pipeline`); here a small stand-in for that code, written
the way it is (`nn.ModuleList` of MLPs, plain attention, a dense layer 0, shared experts), loads the result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import builders
import milo
import zoo
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.source import Checkpoint
from milo.errors import FormatError, UnsupportedModelError
from milo.integrations.transformers.routing import experts_blocks, routing_counts
from milo.modules.matrix import CompressedLinear

IDS = torch.arange(3, 23).reshape(2, 10)
KNOBS = {"ranks": "dense:5+kurtosis:3", "rounds": 2}


class StandInConfig(PreTrainedConfig):
    model_type = "deepseek"


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    def __init__(self, c: StandInConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        self.shared_experts = Mlp(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x) + self.shared_experts(x)


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Layer(nn.Module):
    def __init__(self, c: StandInConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(c.hidden_size)
        self.mlp = Moe(c) if index >= c.first_k_dense_replace else Mlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(c.hidden_size, 1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class StandInBase(PreTrainedModel):
    config_class = StandInConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)


class StandInModel(StandInBase):
    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, 1e-6)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class DeepseekForCausalLM(StandInBase, GenerationMixin):
    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        self.model = StandInModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 checkpoint of the first layout and its compressed form."""
    folder = tmp_path_factory.mktemp("v1")
    shapes, config = builders.deepseek_v1()
    tensors = builders.random_tensors(shapes, torch.float32)
    tensors |= {name: torch.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    builders.write_checkpoint(folder / "source", tensors, config)
    builders.compress(folder / "source", folder / "out", **KNOBS)
    return folder / "source", folder / "out"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_made_from_names_alone_loads_into_the_models_own_code(folders: tuple[Path, Path]) -> None:
    source, out = folders
    model, info = DeepseekForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model.model.layers[1].mlp.experts[3].up_proj, CompressedLinear)
    assert isinstance(model.model.layers[0].mlp.up_proj, CompressedLinear)
    assert isinstance(model.model.layers[1].mlp.gate, nn.Linear)
    reference = DeepseekForCausalLM.from_pretrained(source)
    before = logits(reference)
    for name, weight in builders.matrices(CompressedCheckpoint(out)):
        reference.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert (logits(model) - before).norm() > 0.01 * before.norm()


def test_any_module_with_the_checkpoints_names_takes_the_weights(folders: tuple[Path, Path]) -> None:
    """`milo.load_compressed`: no transformers involved, on the meta device or not."""
    source, out = folders
    expected = logits(DeepseekForCausalLM.from_pretrained(out))
    config = StandInConfig.from_pretrained(source)
    with torch.device("meta"):
        empty = DeepseekForCausalLM(config)
    for module in (empty, DeepseekForCausalLM(config)):
        assert milo.load_compressed(module, out) is module
        assert isinstance(module.model.layers[1].mlp.experts[3].up_proj, CompressedLinear)
        assert torch.equal(logits(module.eval()), expected)


def test_a_module_that_does_not_fit_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = folders
    config = StandInConfig.from_pretrained(source)
    with pytest.raises(
        FormatError, match=r"StandInModel has no linear layer model\.layers\.0\.mlp\.down_proj of shape"
    ):
        milo.load_compressed(StandInModel(config), out)
    headless = DeepseekForCausalLM(config)
    del headless.lm_head
    with pytest.raises(FormatError, match=r"do not fit: missing \[\], left over \['lm_head.weight'\]"):
        milo.load_compressed(headless, out)
    config.hidden_size = 96
    with pytest.raises(FormatError, match=r"has no linear layer model\.layers\.0\.mlp\.down_proj of shape \(64, 160\)"):
        milo.load_compressed(DeepseekForCausalLM(config), out)
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path / "stacked")
    builders.compress(tmp_path / "stacked", tmp_path / "stacked_out", "hqq")
    with pytest.raises(UnsupportedModelError, match="is a fused stack of experts; load it through transformers"):
        milo.load_compressed(nn.Module(), tmp_path / "stacked_out")


def test_it_saves_bit_exactly_and_compresses_on_load_and_in_memory_alike(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = folders
    expected = Checkpoint(out)
    loaded = DeepseekForCausalLM.from_pretrained(out)
    loaded.save_pretrained(tmp_path / "again")
    on_load = DeepseekForCausalLM.from_pretrained(source, quantization_config=milo.MiloConfig(**KNOBS))
    on_load.save_pretrained(tmp_path / "on_load")
    in_memory = milo.compress_model(DeepseekForCausalLM.from_pretrained(source), milo.MiloConfig(**KNOBS))
    milo.save_compressed(in_memory, tmp_path / "in_memory")
    for name in ("again", "on_load", "in_memory"):
        got = Checkpoint(tmp_path / name)
        assert got.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(got.read(n), expected.read(n)) for n in expected.tensors), name
    assert torch.equal(logits(on_load), logits(loaded))
    assert torch.equal(logits(in_memory), logits(loaded))


def test_its_experts_are_counted_by_the_rows_they_receive(folders: tuple[Path, Path]) -> None:
    counts = routing_counts(DeepseekForCausalLM.from_pretrained(folders[0]), IDS.flatten())
    assert counts.keys() == {f"model.layers.{i}.mlp.experts" for i in (1, 2)}
    assert all(sum(tally) == 2 * IDS.numel() for tally in counts.values())


def test_which_token_went_where_is_not_seen(folders: tuple[Path, Path]) -> None:
    assert experts_blocks(DeepseekForCausalLM.from_pretrained(folders[0])) == {}
