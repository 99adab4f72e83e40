"""Offline: ``sgl.Engine`` with compression, many questions over one document, no server.

python examples/offline_engine.py [--model-path MODEL]
"""

import argparse

import sglang as sgl

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model

QUESTIONS = (
    "Who gave this speech?",
    "What does the speaker say about farmers?",
    "Which laws does the speaker ask for?",
)


def run(model: str) -> list[dict]:
    """Print the answers; returns each one's ``meta_info``."""
    engine = sgl.Engine(model_path=model, enable_metasoft=True, metasoft_ratio=4, metasoft_method="snapkv")
    document = DOCUMENT.read_text()
    metas = []
    # The second question shows where prompts leave the document; from the third on they share its compressed form.
    for question in QUESTIONS:
        prompt = f"{document}\n\nQuestion: {question}\nAnswer:"
        output = engine.generate(prompt, sampling_params={"temperature": 0, "max_new_tokens": 24})
        meta = output["meta_info"]
        computed = meta["prompt_tokens"] - meta["cached_tokens"]
        print(f"{question}\n  {output['text'].strip()!r}\n  {meta['prompt_tokens']} prompt tokens, {computed} computed")
        metas.append(meta)
    engine.shutdown()
    return metas


if __name__ == "__main__":  # SGLang starts its processes by importing this file again
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="default: the demo model")
    args = parser.parse_args()
    run(args.model_path or str(demo_model.prepare(demo_model.PATH)))
