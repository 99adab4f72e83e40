"""A chat over a long document with the OpenAI client; the first answer is streamed.

python examples/chat_over_document.py                               # starts a server on the demo model
python examples/chat_over_document.py --url http://localhost:30000  # a server that runs with --enable-metasoft
"""

import argparse

import openai
from serving import serve_demo

from sglang_metasoft.data import DOCUMENT

QUESTIONS = ("Who gave this speech?", "Which rights does the speech list?")


def run(url: str, ratio: float | None = None, max_tokens: int = 48) -> dict:
    """Ask both questions in one chat, print the answers; returns the ``meta_info`` of the second.

    The first answer is streamed. SGLang's chat API reports ``meta_info`` without streaming alone, so the second is not.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    # Without a ratio of its own a request gets the server's; 1 would switch compression off.
    params = {} if ratio is None else {"custom_params": {"metasoft_ratio": ratio}}
    messages = [{"role": "user", "content": f"{DOCUMENT.read_text()}\n\n{QUESTIONS[0]}"}]
    options = {"model": "default", "max_tokens": max_tokens, "temperature": 0}
    print(f"Q: {QUESTIONS[0]}\nA: ", end="")
    answer = ""
    stream = client.chat.completions.create(messages=messages, stream=True, extra_body=params, **options)
    for chunk in stream:
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTIONS[1]}]
    body = {"return_meta_info": True, **params}
    response = client.chat.completions.create(messages=messages, extra_body=body, **options)
    meta = response.choices[0].meta_info
    print(f"\n\nQ: {QUESTIONS[1]}\nA: {response.choices[0].message.content}")
    print(
        f"   {meta['prompt_tokens']} prompt tokens in {meta['metasoft_kv_tokens']} KV entries, "
        f"{meta['metasoft_reused_tokens']} tokens from the compressed first turn"
    )
    return meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--ratio", type=float, help="prompt tokens per kept entry, for these requests")
    args = parser.parse_args()
    with serve_demo(args.url) as url:
        run(url, args.ratio)


if __name__ == "__main__":
    main()
