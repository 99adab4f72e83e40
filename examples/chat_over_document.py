"""A chat over a long document with the OpenAI client, streamed; each turn may ask for its own ratio.

python examples/chat_over_document.py                               # starts a server on the demo model
python examples/chat_over_document.py --url http://localhost:30000  # a server that runs with --enable-metasoft
"""

import argparse

import openai
from serving import serve_demo

from sglang_metasoft.demo import conversation

QUESTIONS = ("Who gave this speech?", "Which rights does the speech list?")


def run(url: str, ratio: float | None = None, max_tokens: int = 48) -> list[dict]:
    """Ask both questions in one chat, print the answers as they come; returns the ``meta_info`` of each turn."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    # Without a ratio of its own a request gets the server's; 1 would switch compression off.
    params = {} if ratio is None else {"custom_params": {"metasoft_ratio": ratio}}
    messages = [{"role": "user", "content": f"{conversation.DOCUMENT.read_text()}\n\n{QUESTIONS[0]}"}]
    metas = []
    for number, question in enumerate(QUESTIONS):
        if number:
            messages.append({"role": "user", "content": question})
        print(f"\nQ: {question}\nA: ", end="")
        answer, meta = "", {}
        stream = client.chat.completions.create(
            model="default", messages=messages, max_tokens=max_tokens, temperature=0, stream=True,
            extra_body={"return_meta_info": True, **params},
        )  # fmt: skip
        for chunk in stream:
            for choice in chunk.choices:
                answer += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
                meta = (choice.model_extra or {}).get("meta_info") or meta
        messages.append({"role": "assistant", "content": answer})
        metas.append(meta)
        print(f"\n   {meta['prompt_tokens']} prompt tokens in {meta['metasoft_kv_tokens']} KV entries")
    return metas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--ratio", type=float, help="prompt tokens per kept entry, for these requests")
    args = parser.parse_args()
    with serve_demo(args.url) as url:
        run(url, args.ratio)


if __name__ == "__main__":
    main()
