"""MiLo's on-disk format read with plain numpy, as docs/format.md describes it, in at most 60 lines."""

import json

import numpy as np


def load(folder):
    """Every compressed matrix, float32 `[N, K]`, by name (`name[i]` for member `i` of a stack)."""
    tensors, found = {}, {}
    for file in folder.glob("*.safetensors"):
        raw = np.fromfile(file, "u1")
        start = 8 + int(raw[:8].view("<u8")[0])
        for name, entry in json.loads(raw[8:start].tobytes()).items():
            kind = {"I32": "u1", "U8": "u1", "F16": "<f2"}.get(entry.get("dtype"))  # words as bytes
            if kind:
                data = raw[slice(*(start + offset for offset in entry["data_offsets"]))].view(kind)
                group = tensors.setdefault(name.rpartition(".")[0], {})
                group[name.rpartition(".")[2]] = data.reshape(*entry["shape"][:-1], -1)
    for entry in json.loads((folder / "config.json").read_text())["quantization_config"]["plan"]["matrices"]:
        runs = [(run + "x1").split("x") for run in entry["ranks"].split()]
        ranks = [int(run[0]) for run in runs for _ in range(int(run[1]))]
        spans = [run.split("-") for run in entry["layers"].split()]
        for layer in [i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)] or [""]:
            mine, ranks = ranks[: entry["count"]], ranks[entry["count"] :]
            for i in range(entry["count"]):
                own = tensors[name := entry["name"].replace("{}", str(layer)).replace("*", str(i))]
                if entry["kind"] == "stack":  # experts lead; their factors stand one after the other
                    rows = slice(sum(mine[:i]), sum(mine[: i + 1]))
                    own = {key: t[rows if key.startswith("lowrank") else i] for key, t in own.items()}
                    name += f"[{i}]"
                found[name] = matrix(own, mine[i], entry)
    return found


def matrix(own, rank, e):
    (n, k), bits, size = e["shape"], e["bits"], e["group_size"]
    plane, groups = {6: 3, 8: 4}.get(bits, bits), -(-k // size)
    planes = ("weight_packed", "weight_packed_hi")[: bits // plane]
    codes = sum(unpack(own[name], plane, k) * 2 ** (plane * i) for i, name in enumerate(planes))
    scale, zero = (own[f"weight_{name}"].astype("f4") for name in ("scale", "zero"))
    if e["scale_bits"] < 16:  # fractions of one scale a row
        scale = unpack(own["weight_scale"], e["scale_bits"], groups) / (2 ** e["scale_bits"] - 1)
        scale *= own["weight_super_scale"].astype("f4")[:, None]
    if e["zero_bits"] < 16:  # equal steps over the range of the codes
        zero = unpack(own["weight_zero"], e["zero_bits"], groups) * (2**bits - 1) / (2 ** e["zero_bits"] - 1)
    weight = (codes - np.repeat(zero, size, 1)[:, :k]) * np.repeat(scale, size, 1)[:, :k]
    return weight + (factor(own, "lowrank_u", n, e).T @ factor(own, "lowrank_v", k, e) if rank else 0)


def factor(own, name, n, e):
    if e["factor"] == "fp16":
        return own[name].astype("f4")
    bits, scale = int(e["factor"][3:]), np.repeat(own[name + "_scale"].astype("f4"), 64, 1)
    return (unpack(own[name], bits, n) - 2 ** (bits - 1)) * scale[:, :n]


def unpack(data, bits, n):  # code i stands in bits b·i .. b·i + b - 1
    stream = np.unpackbits(data, axis=1, count=n * bits, bitorder="little").reshape(len(data), n, bits)
    return (stream @ (1 << np.arange(bits))).astype("f4")
