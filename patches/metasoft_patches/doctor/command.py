"""The subcommand ``doctor``: can this machine, this model and these server flags run with compression?"""

import argparse
import dataclasses
import json

from metasoft_patches.doctor import machine_checks
from metasoft_patches.doctor.machine_checks import Check
from sglang_metasoft.config import MetaSoftConfig, shown

SCHEMA = 1  # grows when a field of the JSON changes or goes
OK, PROBLEMS = 0, 1
NEEDED = ("python", "sglang", "plugin", "hooks")  # before SGLang can be asked about its flags


def main(argv: list[str]) -> int:
    """Run the checks and print them; returns 0, or 1 if one of them found a problem.

    Raises:
        ValueError: an argument or a server flag cannot be used.
    """
    args = _parse(argv)
    checks = machine_checks.machine()
    shape, estimate = None, None
    if args.model_path is not None:
        from metasoft_patches.doctor import model_checks

        check, shape = model_checks.model(args.model_path)
        checks.append(check)
        can_ask = shape is not None and all(check.status != "problem" for check in checks if check.name in NEEDED)
        server, features = None, [Check("features", "skipped", "SGLang and the model must be sound first")]
        if (of_file := model_checks.family_in_file(args.model_path)) is not None:
            checks.append(of_file)
        elif can_ask:
            features, server = model_checks.server(args.model_path, args.server_flags)
        config = server.config if server else MetaSoftConfig()
        if args.metasoft_path is not None:
            config = dataclasses.replace(config, path=args.metasoft_path)
        checks += [model_checks.compressor(config, shape), *features]
        if shape is not None and args.prompt_tokens is not None:
            estimate = model_checks.estimate(args, shape, server)
            checks.append(model_checks.fit(estimate))
    is_ok = all(check.status != "problem" for check in checks)
    if args.json:
        report = {"schema": SCHEMA, "ok": is_ok, "checks": [check._asdict() for check in checks], "estimate": estimate}
        print(json.dumps(report, indent=2))
    else:
        print(_text(checks, estimate, is_ok))
    return OK if is_ok else PROBLEMS


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglang-metasoft doctor",
        description="Say whether this machine can run compression, and what to do where it cannot. Loads no weights.",
        usage="%(prog)s [MODEL] [options] [-- server flags]",
        epilog="Exit code: 0 no problem, 1 problems, 2 wrong usage. Server flags follow --, as for launch_server: "
        "sglang-metasoft doctor --model-path M -- --tp 2 --metasoft-ratio 8",
    )
    parser.add_argument("--model-path", help="Hugging Face folder; also checks the server flags and refused features")
    parser.add_argument("--metasoft-path", help="trained compressor to check against the model")
    parser.add_argument("--prompt-tokens", type=int, help="estimate how many prompts of this length fit the KV pool")
    parser.add_argument("--output-tokens", type=int, default=256, help="per request, for the estimate (default: 256)")
    parser.add_argument("--ratios", default="2,4,8", help="for the estimate (default: 2,4,8)")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of a prefill chunk, for the estimate (2048)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--pool-tokens", type=int, help="size of the KV pool, in tokens")
    size.add_argument("--memory-gib", type=float, help="size of the KV pool of one rank, in GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("server_flags", nargs="*", help="flags of the server, after --")
    is_model_first = argv and not argv[0].startswith("-")
    args = parser.parse_args(["--model-path", *argv] if is_model_first else argv)
    for name in ("prompt_tokens", "output_tokens", "chunk_tokens", "pool_tokens", "memory_gib"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not allowed; allowed: a number above 0")
    try:
        args.ratios = [MetaSoftConfig(ratio=float(part)).ratio for part in args.ratios.split(",")]
    except ValueError:
        allowed = "numbers >= 1, with commas between"
        raise ValueError(f"--ratios: {shown(args.ratios)} is not allowed; allowed: {allowed}") from None
    needs_model = [
        name for name in ("metasoft_path", "prompt_tokens", "pool_tokens", "memory_gib") if getattr(args, name)
    ] + (["server_flags"] if args.server_flags else [])
    if needs_model and args.model_path is None:
        raise ValueError(f"{', '.join(needs_model)} given without --model-path")
    return args


def _text(checks: list[Check], estimate: dict | None, is_ok: bool) -> str:
    marks = {"ok": "ok     ", "problem": "PROBLEM", "skipped": "skipped"}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]}  {check.name:{width}}  {check.found}")
        if check.remedy:
            lines.append(f"{'':9}{'':{width}}  -> {check.remedy}")
    if estimate is not None:
        lines += ["", *_table(estimate)]
    count = sum(check.status == "problem" for check in checks)
    lines += ["", "no problem found" if is_ok else f"{count} problem{'s' if count > 1 else ''} found"]
    return "\n".join(lines)


def _host_pool(estimate: dict) -> list[str]:
    tokens, output = estimate["host_pool_tokens"], estimate["output_tokens"]
    if not tokens:
        return []
    raw = tokens // (estimate["prompt_tokens"] + output)
    compressed = [
        f"{tokens // (fit['prompt_entries'] + output):,} at ratio {fit['ratio']:g}" for fit in estimate["fits"]
    ]
    size = f"a host pool of {tokens:,} tokens (if the host has that memory)"
    return [f"{size} holds {raw:,} of them raw, {', '.join(compressed)}"]


def _table(estimate: dict) -> list[str]:
    raw = estimate["requests_raw"]
    rows = [("ratio", "entries per prompt", "requests at once", "with --metasoft-during-prefill")]
    rows.append(("none", f"{estimate['prompt_tokens']:,}", f"{raw:,}", ""))
    for fit in estimate["fits"]:
        note = f"not compressed: {fit['bypass']}" if fit["bypass"] else f"{fit['requests_during_prefill']:,}"
        rows.append((f"{fit['ratio']:g}", f"{fit['prompt_entries']:,}", f"{fit['requests']:,}", note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    head = (
        f"KV pool of {estimate['pool_tokens']:,} tokens ({estimate['pool_source']}), "
        f"{estimate['kv_bytes_per_token']:,} bytes per token; prompts of {estimate['prompt_tokens']:,} tokens, "
        f"{estimate['output_tokens']:,} output tokens:"
    )
    return [
        head,
        *(
            "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        *_host_pool(estimate),
        f"compressing one takes at most {estimate['workspace_bytes'] / 2**20:,.0f} MiB of a GPU beside the pool",
    ]
