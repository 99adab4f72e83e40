"""Pack all that a GPU machine without network needs: SGLang 0.5.17, FlashInfer, small wheels, and the demo model.

For a machine with Python 3.12, torch 2.11 on CUDA 13.0, Triton, transformers, nvcc, ninja and a Hopper GPU; SGLang
0.5.17 is the version that pins that torch. Kernels for other GPUs, image and video models and servers in Rust are left
out, so that one load stays under 64 MB:

    make gpu-pack                     # or: python tests/gpu/pack.py .gpu

writes ``.gpu/code/``, ``.gpu/model-a/`` and ``.gpu/model-b/`` (each a load of its own) and ``.gpu/<load>/unpack.sh``.
On the machine, in the repository's root, after each load: ``source .gpu/<load>/unpack.sh``; then ``make gpu-test``'s
command, ``python3 -m pytest tests/gpu -s``.
"""

import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sglang_metasoft.demo import model as demo_model  # noqa: E402

PYTHON = "3.12"
GLIBC = (34, 31, 28, 27, 26, 24, 17)
KERNELS = "sglang-kernel==0.4.5"
WHEELS = (
    "sglang==0.5.17", "flashinfer-python==0.6.15.post1", "apache-tvm-ffi==0.1.11", KERNELS, "orjson==3.13.0",
    "pybase64==1.5.1", "starlette==1.10.0", "ipython==9.18.1", "traitlets==5.16.1", "pydantic==2.14.3",
    "pydantic-core==2.50.4", "annotated-types==0.8.0", "typing-inspection==0.4.5", "msgspec==0.22.0", "pyzmq==27.3.0",
    "dill==0.4.1", "openai==2.6.1", "sniffio==1.3.1", "distro==1.9.0", "partial-json-parser==0.2.1.1.post7",
    "xgrammar==0.2.1", "setproctitle==1.3.8", "compressed-tensors==0.20.0", "loguru==0.7.3", "gguf==0.19.0",
    "uvicorn==0.54.0", "fastapi==0.165.0", "opentelemetry-api==1.45.2", "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1", "referencing==0.37.0", "rpds-py==2026.9.1", "python-multipart==0.0.34",
    "interegular==0.3.3", "soundfile==0.13.1", "cffi==2.0.0", "pycparser==2.23",
)  # fmt: skip
KERNEL_FOLDERS_LEFT_OUT = re.compile(
    r"flash_ops|flashmla_ops|infllm_ops|sgl_kernel/sm100/|^(?!sgl_kernel/|.*dist-info/)"
)
LEFT_OUT = (
    "sglang/multimodal_gen", "sglang/test", "sglang/srt/server/_core*.so", "sglang/srt/grpc/_core*.so",
    "sglang/srt/multimodal/_core*.so", "xgrammar/lib", "*.data",
)  # fmt: skip
# SGLang 0.5.17 registers configurations that this transformers already knows.
REGISTER = re.compile(
    r"^(?!.*exist_ok)(.*\b(?:Auto(?:Config|Tokenizer|Processor|ImageProcessor|Model\w*))\.register\(.*[^(,])\)$", re.M
)
UNPACKED = ".gpu/unpacked"  # from the repository's root of the machine that the loads go to
LOAD_LIMIT_BYTES = 60 * 2**20


def download(folder: Path) -> None:
    """Fetch every wheel for the GPU machine's Python."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    subprocess.run([*command, *WHEELS], check=True)


def unpack(wheels: Path, site: Path) -> None:
    """All wheels into one folder for ``PYTHONPATH``, without what is not needed."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if wheel.name.startswith("sglang_kernel"):
                names = [name for name in names if not KERNEL_FOLDERS_LEFT_OUT.search(name)]
            archive.extractall(site, names)
    for pattern in LEFT_OUT:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (site / "sglang" / "srt").rglob("*.py"):
        text = path.read_text()
        changed = REGISTER.sub(r"\1, exist_ok=True)", text)
        if changed != text:
            path.write_text(changed)


def write_load(folder: Path, name: str, script: str) -> None:
    load = folder / name
    (load / "unpack.sh").write_text(script)
    size = sum(path.stat().st_size for path in load.iterdir())
    print(f"{load}: {size / 2**20:.1f} MiB")
    if size > LOAD_LIMIT_BYTES:
        raise SystemExit(f"{load} has {size} bytes; allowed: {LOAD_LIMIT_BYTES}")


def pack_code(folder: Path) -> None:
    load = folder / "code"
    load.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = Path(scratch) / "wheels", Path(scratch) / "site"
        download(wheels)
        unpack(wheels, site)
        with lzma.open(load / "site.tar.xz", "wb", preset=3) as sink, tarfile.open(fileobj=sink, mode="w") as archive:
            archive.add(site, "site")
    # The project's own wheel: SGLang finds plugins by the metadata of installed packages.
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(load), str(root)], check=True)
    write_load(
        folder,
        "code",
        f"""mkdir -p {UNPACKED} && tar xJf .gpu/code/site.tar.xz -C {UNPACKED}
export PYTHONPATH=$PWD/{UNPACKED}/site
python3 -m pip install -q --no-deps --no-index --upgrade --target {UNPACKED}/site .gpu/code/*.whl
if [ -d .gpu/code/aot ]; then cp -r .gpu/code/aot {UNPACKED}/site/flashinfer/data/; fi
""",
    )


def pack_model(folder: Path) -> None:
    """The demo model's GGUF in two halves."""
    with tempfile.TemporaryDirectory() as scratch:
        gguf = demo_model.download(Path(scratch))
        data = gguf.read_bytes()
        half = len(data) // 2
        for name, part in (("model-a", data[:half]), ("model-b", data[half:])):
            load = folder / name
            load.mkdir(parents=True, exist_ok=True)
            (load / "part").write_bytes(part)
    write_load(folder, "model-a", f"mkdir -p {UNPACKED} && cp .gpu/model-a/part {UNPACKED}/part-a\n")
    write_load(
        folder,
        "model-b",
        f"""mkdir -p {UNPACKED}/gguf && cat {UNPACKED}/part-a .gpu/model-b/part > {UNPACKED}/gguf/{gguf.name}
export PYTHONPATH=$PWD/{UNPACKED}/site METASOFT_DEMO_DIR=$PWD/{UNPACKED}/demo
python3 -c "from pathlib import Path; from sglang_metasoft.demo import model; \\
model.convert(Path('{UNPACKED}/gguf'), Path('{UNPACKED}/demo/SmolLM2-135M-Instruct'))"
""",
    )


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".gpu")
    pack_code(target)
    pack_model(target)
