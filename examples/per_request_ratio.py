"""One server, one document, several ratios: what each holds, and what it answers.

python examples/per_request_ratio.py [--url http://localhost:30000]
"""

import argparse

import requests
from serving import serve_demo

from sglang_metasoft.data import DOCUMENT

RATIOS = (1, 2, 4, 8, 16)
QUESTION = "\n\nQuestion: Who gave this speech?\nAnswer:"


def run(url: str, ratios: tuple[float, ...] = RATIOS) -> list[dict]:
    """Print a line a ratio; returns each response's ``meta_info``."""
    metas = []
    print("ratio  prompt tokens  KV entries  answer")
    for ratio in ratios:
        sampling = {"temperature": 0, "max_new_tokens": 16, "custom_params": {"metasoft_ratio": ratio}}
        body = {"text": DOCUMENT.read_text() + QUESTION, "sampling_params": sampling}
        response = requests.post(f"{url}/generate", json=body, timeout=600)
        response.raise_for_status()
        answer, meta = response.json()["text"], response.json()["meta_info"]
        print(f"{ratio:5}  {meta['prompt_tokens']:13}  {meta['metasoft_kv_tokens']:10}  {' '.join(answer.split())!r}")
        metas.append(meta)
    return metas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server")
    args = parser.parse_args()
    with serve_demo(args.url) as url:
        run(url)


if __name__ == "__main__":
    main()
