"""Ways in which a checkpoint folder can be broken: each damages a whole folder and says what the error must name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import builders

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
Damage = Callable[[Path], Path]


def truncated_shard(folder: Path) -> Path:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[: len(data) // 2])
    return folder


def shard_with_a_tail(folder: Path) -> Path:
    with (folder / SECOND).open("ab") as stream:
        stream.write(b"\0" * 7)
    return folder


def shard_cut_within_its_header(folder: Path) -> Path:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:20])
    return folder


def shard_of_five_bytes(folder: Path) -> Path:
    (folder / SECOND).write_bytes(b"hello")
    return folder


def shard_that_is_an_html_page(folder: Path) -> Path:
    (folder / SECOND).write_text("<!doctype html><title>404</title>" * 20)
    return folder


def header_that_is_no_json(folder: Path) -> Path:
    (folder / SECOND).write_bytes(struct.pack("<Q", 16) + b"{not json at all")
    return folder


def header_that_is_a_list(folder: Path) -> Path:
    (folder / SECOND).write_bytes(struct.pack("<Q", 16) + b"[1, 2, 3, 4, 5 ]")
    return folder


def header_entry_without_offsets(folder: Path) -> Path:
    text = json.dumps({"x.weight": {"dtype": "F32", "shape": [1]}}).encode()
    (folder / SECOND).write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def missing_shard(folder: Path) -> Path:
    (folder / SECOND).unlink()
    return folder


def index_naming_absent_tensors(folder: Path) -> Path:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost.weight"] = SECOND
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def index_naming_the_wrong_shard(folder: Path) -> Path:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = SECOND
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def index_without_a_map(folder: Path) -> Path:
    (folder / INDEX).write_text("{}")
    return folder


def index_that_is_no_json(folder: Path) -> Path:
    (folder / INDEX).write_text("{")
    return folder


def tensor_in_two_shards(folder: Path) -> Path:
    tensors = load_file(folder / SECOND)
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / SECOND, metadata={"format": "pt"})
    return folder


def integer_weights(folder: Path) -> Path:
    tensors = load_file(folder / SECOND)
    name = next(name for name in tensors if ".experts." in name)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / SECOND, metadata={"format": "pt"})
    return folder


def missing_expert(folder: Path) -> Path:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    tensors = load_file(folder / shard)
    del tensors[name]
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    return folder


def pickles_only(folder: Path) -> Path:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    return folder


def no_weights_at_all(folder: Path) -> Path:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return folder


def no_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def config_that_is_no_json(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "mixtral",')
    return folder


def config_that_is_a_list(folder: Path) -> Path:
    (folder / "config.json").write_text("[]")
    return folder


def a_file_in_place_of_a_folder(folder: Path) -> Path:
    return folder / "config.json"


def no_such_folder(folder: Path) -> Path:
    return folder.with_name("nowhere")


def quantised_source(folder: Path) -> Path:
    builders.edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return folder


# What the message must hold: the file or tensor, and where there is one, the remedy.
OF_FILES: dict[Damage, str] = {
    truncated_shard: rf"{SECOND} is \d+ bytes long but its header describes \d+: truncated or damaged",
    shard_with_a_tail: rf"{SECOND} is \d+ bytes long but its header describes \d+: truncated or damaged",
    shard_cut_within_its_header: rf"{SECOND} is truncated or not a safetensors file",
    shard_of_five_bytes: rf"{SECOND} is truncated or not a safetensors file",
    shard_that_is_an_html_page: rf"{SECOND} is truncated or not a safetensors file",
    header_that_is_no_json: rf"{SECOND} has an unreadable header",
    header_that_is_a_list: rf"{SECOND} has an unreadable header",
    header_entry_without_offsets: rf"{SECOND} has a damaged header entry for x\.weight",
    missing_shard: rf"lacks {SECOND}; finish the download",
    index_naming_absent_tensors: rf"says {SECOND} holds model\.layers\.9\.ghost\.weight, but it does not; download",
    index_naming_the_wrong_shard: rf"says {SECOND} holds lm_head\.weight, but it does not; download it again",
    index_without_a_map: rf"{INDEX} has no weight_map; download it again",
    index_that_is_no_json: rf"{INDEX} is not readable JSON",
    tensor_in_two_shards: rf"lm_head\.weight stands in both .*{SECOND}.*; remove the stale shard",
    pickles_only: "has PyTorch pickles only; load it with transformers and save_pretrained it",
    no_weights_at_all: "has neither model.safetensors nor model.safetensors.index.json; is it a model folder",
    a_file_in_place_of_a_folder: "config.json is not a folder; give a local model folder or a hub model name",
    no_such_folder: "nowhere is not a folder; give a local model folder or a hub model name",
}
OF_CONTENT: dict[Damage, str] = {
    no_config: r"config\.json is missing",
    config_that_is_no_json: r"config\.json is not readable JSON",
    config_that_is_a_list: r"config\.json holds no JSON object",
    integer_weights: r"experts\..* has dtype I8, which is no floating-point weight; start from the original",
    missing_expert: r"layers\.1\.block_sparse_moe\.experts\.\*\.w1\.weight: expert 2 is missing; finish the download",
    quantised_source: r"already quantised \(quant_method: gptq\); start from the original checkpoint",
}
