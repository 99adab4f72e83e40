"""The demo from the first line to the last."""

from pathlib import Path

import requests

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.demo import conversation, setup, table
from sglang_metasoft.demo.progress import Progress
from sglang_metasoft.demo.questions import MAX_ANSWER_TOKENS, Task, check_length
from sglang_metasoft.local_server import Server
from sglang_metasoft.pipeline.estimate import fit_compressed, fit_raw


def run(folder: Path, task: Task, flags: list[str]) -> None:
    """Fetch the model, start the server, ask, print what was answered and held, stop the server.

    Args:
        folder: where the model is or will be.
        flags: further server arguments.

    Raises:
        ValueError: the document is too long; no server was started.
        setup.DemoFailed: a step failed.
    """
    progress = Progress(steps=2 + len(task.questions))
    model_log, server_log = folder.parent / "model.log", folder.parent / "server.log"
    with progress.step(f"model {folder.name}: download and convert, unless it is in {folder}", "a minute"):
        setup.get_model(folder, model_log)
    boundary_tokens = check_length(task, *_tokenizer_and_context(folder))
    with progress.step(f"server: SGLang with --enable-metasoft, its log is {server_log}", "a minute"):
        server = setup.start_server(folder, flags, server_log)
    with server:
        ask_all(server, task, boundary_tokens, progress)
    print("\nYour own document:\n  sglang-metasoft demo --document FILE --ask QUESTION [--ask QUESTION ...]")


def ask_all(server: Server, task: Task, boundary_tokens: int, progress: Progress) -> None:
    print(f"\nDocument: {task.name}, {boundary_tokens:,} tokens; one server, each question with both caches.")
    if task.is_shipped:
        print(
            "The questions were chosen by running: of 62 tried, this 135M model answered 11 with the full cache\n"
            "and 8 with the compressed one, those 8 with both (docs/index.md)."
        )
    else:
        print("This is a 135M model: it often answers wrongly, with the full cache too. Compare the two columns.")
    conversations = conversation.converse(server, task, boundary_tokens)
    prompt_tokens = 0
    for number, question in enumerate(task.questions):
        what = "the next turn of the same chat" if question.is_next_turn else "a question about the document"
        with progress.step(what, "a few seconds, the document is cached" if number else "a minute, both read it all"):
            try:
                _, answers = next(conversations)
            except requests.RequestException as error:
                said = error.response.text if error.response is not None else error
                raise setup.DemoFailed(f"the server did not answer: {said}\nIts log: {server.log}") from None
        print(table.side_by_side(question, answers["full"], answers["compressed"]), end="\n\n")
        prompt_tokens = max(prompt_tokens, answers["full"].prompt_tokens)
    print(_memory(server, prompt_tokens))


def _memory(server: Server, prompt_tokens: int) -> str:
    info = server.info()
    shown = info["internal_states"][0]["metasoft"]
    config = MetaSoftConfig(**{name: shown[name] for name in ("ratio", "window", "sink", "min_tokens")})
    pool_tokens = info["max_total_num_tokens"]
    lengths = {"pool_tokens": pool_tokens, "prompt_tokens": prompt_tokens, "output_tokens": MAX_ANSWER_TOKENS}
    fit = fit_compressed(config, config.ratio, chunk_tokens=info["chunked_prefill_size"], **lengths)
    return table.memory_effect(pool_tokens, prompt_tokens, fit_raw(**lengths), fit.requests)


def _tokenizer_and_context(folder: Path):
    from transformers import AutoConfig, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).max_position_embeddings
