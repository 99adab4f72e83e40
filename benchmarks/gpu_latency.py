"""Seconds of a long prompt's prefill on a GPU, compressed and not, and milliseconds of a decode step after it.

    python benchmarks/gpu_latency.py [--model demo] [--prompt-tokens 32768] [-- --attention-backend triton]

How it is run: ``benchmarks/gpu_servers.py``.
"""

import statistics
import time

from gpu_servers import main, run_servers


def measure(args) -> None:
    """Seconds of a prompt's prefill (and compression), and milliseconds of a decode step after it."""

    def seconds(server, prompt, new_tokens) -> float:
        begin = time.perf_counter()
        server.generate(prompt, new_tokens, sampling_params={"ignore_eos": True})
        return time.perf_counter() - begin

    def one_server(server, make_prompt) -> dict:
        prefills, steps = [], []
        for _ in range(3):
            prompt = make_prompt()
            prefills.append(seconds(server, prompt, 2))
            few, many = (seconds(server, prompt, count) for count in (2, 130))  # the prompt is cached by now
            steps.append((many - few) / 128)
        return {
            "prefill_seconds": round(statistics.median(prefills), 3),
            "decode_step_ms": round(1e3 * statistics.median(steps), 3),
        }

    run_servers(args, "latency", one_server, ["--max-total-tokens", str(4 * args.prompt_tokens)])


if __name__ == "__main__":
    main(__doc__, measure)
