"""Pack vLLM for a Hopper GPU machine that has PyTorch but no network: parts small enough to be carried one at a time.

    python benchmarks/vllm_site.py pack OUT [--part-mb 60]        -> OUT/vllm.00 ... and OUT/fa3.00 ...

and there, in a checkout of MiLo,

    mkdir SITE; cat vllm.* | xz -dc -T0 | tar xf - -C SITE
    python benchmarks/vllm_site.py register SITE                  MiLo's entry points, as if it were installed
    export PYTHONPATH=$PWD/src:SITE

The wheels of vLLM 0.26.0 and of what a plain PyTorch machine lacks hold a gigabyte, nearly all of it machine code for
other GPUs and attention kernels that `--attention-backend TRITON_ATTN` does not use. In a shared object CUDA code
stands in *fat binaries*, one a source file, each a list of entries (an architecture's machine code, or PTX). The
driver takes the machine code of its architecture, else compiles the newest PTX that is not newer; every other entry
is overwritten with zeros here. Offsets stay as they are, and zeros cost nothing once compressed. `fa3.*` is
FlashAttention 3 alone, which the prefill of latent attention (DeepSeek) needs.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = 90
PYTHON = "3.12"
ALONE = (  # vLLM's own pins; what these need in turn is in TOGETHER or on the machine
    "vllm==0.26.0", "compressed-tensors==0.17.0", "xgrammar==0.2.1", "llguidance==1.7.0", "outlines_core==0.2.14",
    "lm-format-enforcer==0.11.3", "mistral_common", "humming-kernels==0.1.10", "pyelftools",
    "model-hosting-container-standards", "apache-tvm-ffi==0.1.10", "interegular", "loguru", "pydantic_extra_types",
    "pycountry", "pydantic-settings", "sniffio", "jmespath",
)  # fmt: skip
TOGETHER = (
    "fastapi<0.137,>=0.133", "uvicorn", "starlette", "cachetools", "blake3", "pydantic>=2.12", "openai>=2",
    "prometheus-fastapi-instrumentator", "partial-json-parser", "pyzmq", "msgspec", "python-json-logger", "pybase64",
    "cbor2", "ijson", "setproctitle", "openai-harmony", "anthropic", "mcp", "opentelemetry-api", "opentelemetry-sdk",
    "jsonschema", "lark", "watchfiles", "depyf", "tiktoken",
)  # fmt: skip
FLASH_ATTENTION_3 = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
UNUSED = (  # other GPUs, other languages, data of other models; each was left out and vLLM still imported
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100",
    "vllm/vllm-rs", "vllm/_qutlass_C.abi3.so", "xgrammar/lib", "xgrammar/include", "xgrammar/docs",
    "mistral_common/data", "pycountry/locales",
)  # fmt: skip
_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # of a fat binary: magic, version, bytes of its header
_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class Entry:
    """One architecture's code in a fat binary; `begin` and `end` are file offsets of the code itself."""

    kind: int
    architecture: int
    begin: int
    end: int


def fat_binaries(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """The fat binaries of a shared object, one list of entries each."""
    position = 0
    while (position := data.find(_MAGIC, position)) >= 0:
        (size,) = struct.unpack_from("<Q", data, position + 8)
        at, end = position + 16, position + 16 + size
        if end > len(data):  # the magic number by chance, in other data
            position += 4
            continue
        entries = []
        while at < end:
            kind, _, header, length = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            entries.append(Entry(kind, architecture, at + header, at + header + length))
            at += header + length
        yield entries
        position = end


def needed(entries: list[Entry], architecture: int) -> list[Entry]:
    """What a GPU of `architecture` (90 for 9.0) can take of one fat binary."""
    native = [entry for entry in entries if (entry.kind, entry.architecture) == (_MACHINE_CODE, architecture)]
    if native:
        return native
    ptx = [entry for entry in entries if entry.kind == _PTX and entry.architecture <= architecture]
    newest = max((entry.architecture for entry in ptx), default=0)
    return [entry for entry in ptx if entry.architecture == newest]


def keep_only(path: Path, architecture: int) -> int:
    """Overwrite what other architectures need with zeros; returns how many bytes."""
    data, dropped = bytearray(path.read_bytes()), 0
    for entries in fat_binaries(data):
        kept = needed(entries, architecture)
        for entry in entries:
            if entry not in kept:
                data[entry.begin : entry.end] = bytes(entry.end - entry.begin)
                dropped += entry.end - entry.begin
    if dropped:
        path.write_bytes(data)
    return dropped


def download(wheels: Path) -> None:
    """The wheels for Python 3.12 on x86-64 Linux, whatever runs here."""
    tags = ["any", "linux_x86_64", "manylinux1_x86_64", "manylinux2014_x86_64"]
    tags += [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
    options = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "-q", "-d", str(wheels)]
    options += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")] + [f"--platform={tag}" for tag in tags]
    pip = [sys.executable, "-m", "pip", "download", *options]
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    subprocess.run([*pip, *TOGETHER], check=True)


def unpack(wheels: Path, site: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)


def prune(site: Path, all_architectures: bool) -> None:
    """Remove what is not used, and (unless they are wanted) other architectures' code from the rest."""
    for name in UNUSED:
        path = site / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in site.glob("vllm/**/*.so") if not all_architectures else ():
        keep_only(path, ARCHITECTURE)
    for path in site.rglob("*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(path)], check=False, stderr=subprocess.DEVNULL)


def pack(site: Path, out: Path, name: str, members: list[str], part_mb: int) -> None:
    """`members` of the site as `OUT/NAME.00`, ... of at most `part_mb` megabytes each."""
    tar = subprocess.Popen(["tar", "cf", "-", "-C", str(site), *members], stdout=subprocess.PIPE)
    xz = subprocess.Popen(["xz", "-T0", "-9e", "-c"], stdin=tar.stdout, stdout=subprocess.PIPE)
    split = ["split", "-b", f"{part_mb}MB", "-d", "-", str(out / f"{name}.")]
    subprocess.run(split, stdin=xz.stdout, check=True)
    if tar.wait() or xz.wait():
        raise SystemExit(f"packing {name} failed")


def register(site: Path, project: Path) -> None:
    """Metadata of this checkout, from which vLLM learns of the plugin where nothing can be installed."""
    about = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    folder = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    heading = f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
    (folder / "METADATA").write_text(heading, encoding="utf-8")
    groups = {"console_scripts": about["scripts"], **about.get("entry-points", {})}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def make(options: argparse.Namespace) -> None:
    """Download, unpack, prune, pack."""
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        site, wheels = Path(work) / "site", options.wheels or Path(work) / "wheels"
        if options.wheels is None:
            wheels.mkdir()
            download(wheels)
        unpack(wheels, site)
        prune(site, options.all_architectures)
        pack(site, options.out, "fa3", [FLASH_ATTENTION_3], options.part_mb)
        (site / FLASH_ATTENTION_3).unlink()
        pack(site, options.out, "vllm", ["."], options.part_mb)
    for part in sorted(options.out.glob("*.[0-9][0-9]")):
        print(f"{part.stat().st_size / 1e6:6.1f} MB  {part}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--part-mb", type=int, default=60)
    packing.add_argument("--wheels", type=Path, help="folder of wheels that were downloaded before")
    packing.add_argument("--all-architectures", action="store_true", help="leave the machine code as it is")
    packing.set_defaults(run=make)
    registering = commands.add_parser("register")
    registering.add_argument("site", type=Path)
    registering.set_defaults(
        run=lambda options: register(options.site, Path(__file__).parent.parent / "pyproject.toml")
    )
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
