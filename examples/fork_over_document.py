"""SGLang's frontend language over one long document: a program reads it once, then forks into several questions.

Each fork's prompt is the document and its own question. The first fork shows the server where prompts leave the
document; from then on the document is one compressed segment that every fork reuses.

    python examples/fork_over_document.py                               # starts a server on the demo model
    python examples/fork_over_document.py --url http://localhost:30000  # a server that runs with --enable-metasoft
"""

import argparse

import sglang as sgl
from serving import serve_demo

from sglang_metasoft.data import DOCUMENT

QUESTIONS = (
    "Who gave this speech?",
    "Which laws does the speaker ask for?",
    "What does the speaker say about farmers?",
    "What does the speaker say about doctors?",
    "Which countries does the speaker name?",
)


@sgl.function
def read_and_fork(s, document: str, questions: tuple[str, ...]):
    """One summary, then one fork a question; the forks' states are kept in ``answers``."""
    s += document
    summary = s.fork(1)[0]
    summary += "\n\nIn one sentence, this speech says that"
    summary += sgl.gen("answer", max_tokens=24, temperature=0)
    summary["answer"]  # wait for it: the forks below find the document in the cache
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += f"\n\nQuestion: {question}\nAnswer:"
        fork += sgl.gen("answer", max_tokens=24, temperature=0)
    s["answers"] = [summary, *forks]


def run(url: str) -> list[dict]:
    """Run the program against a server, print the answers; returns the ``meta_info`` of each."""
    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    state = read_and_fork.run(document=DOCUMENT.read_text(), questions=QUESTIONS)
    metas = []
    for name, fork in zip(("(summary)", *QUESTIONS), state["answers"], strict=True):
        meta = fork.get_meta_info("answer")
        metas.append(meta)
        computed = meta["prompt_tokens"] - meta["cached_tokens"]
        print(f"{name}\n  {fork['answer'].strip()!r}")
        print(f"  {meta['prompt_tokens']} prompt tokens, {computed} computed, {meta['metasoft_kv_tokens']} KV entries")
    return metas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server")
    args = parser.parse_args()
    with serve_demo(args.url) as url:
        run(url)


if __name__ == "__main__":
    main()
