"""The demo: two questions about a long document in one chat, over a compressed KV cache."""

import tempfile
from pathlib import Path

from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.demo.server import Server

DOCUMENT = Path(__file__).with_name("document.txt")
QUESTIONS = (
    "Who gave this speech, and what is the most important thing it asks for?",
    "Which rights does the speech list?",
)


def run(folder: Path, flags: list[str]) -> None:
    """Convert the model, start the server, ask both questions, print what was saved, stop the server.

    Args:
        folder: where the model is kept.
        flags: further server arguments.
    """
    print("1/3  demo model: SmolLM2-135M-Instruct")
    model = demo_model.prepare(folder / "SmolLM2-135M-Instruct")
    flags = ["--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR, *flags]
    print("2/3  starting: python -m sglang.launch_server", *flags)
    with tempfile.TemporaryDirectory() as scratch:
        with Server(model, flags, log=Path(scratch) / "server.log") as server:
            print("3/3  a document and two questions, one chat")
            talk(server)


def talk(server: Server) -> None:
    """Ask the questions and print answers and figures."""
    messages = [{"role": "user", "content": f"{DOCUMENT.read_text()}\n\n{QUESTIONS[0]}"}]
    for number, question in enumerate(QUESTIONS):
        if number:
            messages.append({"role": "user", "content": question})
        response = server.chat(messages, return_meta_info=True)
        choice = response["choices"][0]
        messages.append(choice["message"] | {"tool_calls": None, "reasoning_content": None})
        print(f"\nQ: {question}\nA: {choice['message']['content'].strip()}")
        print(describe(choice["meta_info"], response["usage"]))


def describe(meta: dict, usage: dict) -> str:
    """One line of figures for a response."""
    tokens, entries = usage["prompt_tokens"], meta["metasoft_kv_tokens"]
    if "metasoft_bypass" in meta:
        return f"   {tokens} prompt tokens, not compressed: {meta['metasoft_bypass']}"
    return (
        f"   {tokens} prompt tokens -> {entries} KV entries per layer and head: {tokens - entries} saved, "
        f"{tokens / entries:.1f}x; {meta['cached_tokens']} tokens cached, "
        f"{meta['metasoft_reused_tokens']} of them from a compressed prefix"
    )
