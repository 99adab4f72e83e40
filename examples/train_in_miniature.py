"""Training in miniature: a compressor from one text, in minutes, and an answer over a prompt that it compressed.

    python examples/train_in_miniature.py [--model-path MODEL] [--steps N] [--output FOLDER]

Twelve prompts and thirty steps show how it goes, not how good it gets: see docs/training.md for a real run.
"""

import argparse
import json
import tempfile
from pathlib import Path

import sglang as sgl

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.train.command import train
from sglang_metasoft.train.settings import TrainSettings

QUESTION = "\n\nQuestion: Who gave this speech, and to whom?\nAnswer:"


def run(model: str, output: Path, steps: int, cases: int) -> dict:
    """Train, print the scores, ask; returns the answer's ``meta_info``."""
    texts = output / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    document = DOCUMENT.read_text()
    (texts / "document.txt").write_text(document)
    settings = TrainSettings(
        model=model, data=texts, output=output, cases=cases, steps=steps, selector_steps=max(1, steps // 10),
        min_prefix_tokens=250, max_prefix_tokens=400, validation_cases=2,
    )  # fmt: skip
    scores = train(settings)
    print(json.dumps({name: round(score, 3) for name, score in scores.items() if name.startswith("overlap")}, indent=2))

    engine = sgl.Engine(model_path=model, enable_metasoft=True, metasoft_path=str(output / "compressor"))
    response = engine.generate(document[:8000] + QUESTION, sampling_params={"temperature": 0, "max_new_tokens": 32})
    engine.shutdown()
    meta = response["meta_info"]
    print(f"{response['text'].strip()!r}\n{meta['prompt_tokens']} prompt tokens, {meta['metasoft_kv_tokens']} entries")
    return meta


if __name__ == "__main__":  # SGLang starts its processes by importing this file again
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="default: the demo model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", type=int, default=12, help="distinct prompts")
    parser.add_argument("--output", type=Path, help="folder of the run; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model_path or str(demo_model.prepare(demo_model.PATH))
        run(path, args.output or Path(scratch), args.steps, args.cases)
