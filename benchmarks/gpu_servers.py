"""What the benchmarks named ``gpu_…`` share: the model's shape, their arguments, and servers with and without MetaSoft.

Plain SGLang and SGLang with ``--enable-metasoft`` are measured in the same run, one after the other; what follows
``--`` are further flags of both. Without a GPU a benchmark only says what it would measure; ``--cpu`` runs it all the
same. Each result is one line of JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip


def main(doc: str, measure, *, has_servers: bool = True) -> None:
    """Run ``measure(arguments)`` with the command line's, or say why not."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=32_768)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--cpu", action="store_true", help="measure although there is no GPU")
    if has_servers:
        parser.add_argument(
            "--model", choices=("llama-8b", "demo"), default="llama-8b",
            help="Llama-3.1-8B's shape with random weights, or the demo model",
        )  # fmt: skip
        parser.add_argument("--requests", type=int, default=24, help="sent at once, where load is measured")
    end = sys.argv.index("--") if has_servers and "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    args.flags = sys.argv[end + 1 :]
    if not torch.cuda.is_available() and not args.cpu:
        print(f"No GPU here. Would measure: {measure.__doc__}")
        return
    measure(args)


def report(**values) -> None:
    """Print one result with the device and the date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps(values | {"device": device, "date": time.strftime("%Y-%m-%d")}), flush=True)


def prepare_model(name: str, folder: Path) -> tuple[Path, list[str], int]:
    """Folder, flags and vocabulary size."""
    if name == "demo":
        return demo_model.prepare(demo_model.PATH), [], 49_000
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder, ["--load-format", "dummy", "--skip-tokenizer-init"], 128_000


def run_servers(args, what: str, measure, common: list[str]) -> None:
    """``measure(server, prompt maker)`` on each kind of server."""
    with tempfile.TemporaryDirectory() as scratch:
        model, flags, vocab_size = prepare_model(args.model, Path(scratch))
        metasoft = ["--enable-metasoft", "--metasoft-ratio", str(args.ratio), "--metasoft-during-prefill"]
        for name, own in (("plain", []), ("metasoft", metasoft)):
            source = random.Random(1)  # the same prompts for both

            def make_prompt(source=source):
                return [source.randrange(vocab_size) for _ in range(args.prompt_tokens)]

            log = Path(scratch) / f"{name}.log"
            with Server(model, [*flags, *common, *own, *args.flags, "--enable-metrics"], log=log) as server:
                server.generate(make_prompt()[:1000], 4)
                report(what=what, server=name, model=args.model, prompt_tokens=args.prompt_tokens,
                       ratio=args.ratio, **measure(server, make_prompt))  # fmt: skip
