"""Random programs against plain SGLang as the oracle, until the time is over or one fails; that one is made small.

    python -m tests.differential.fuzz [--seconds 600] [--seed N] [--variant chunks] [--replay kept.json ...]

Prints its seed first, and a failing program as JSON: put that into ``tests/differential/kept/`` to have it replayed.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from sglang_metasoft.data import DOCUMENT
from tests.differential.programs import Run
from tests.differential.servers import VARIANTS, Fleet
from tests.differential.strategies import programs

EXAMPLES_AT_ONCE = 10
FAILING = Path(".fuzz")


class Failed(AssertionError):
    """A program came out wrong; the message ends with it."""


def check(fleet: Fleet, tokenizer, document_ids, program: dict) -> Counter:
    """Run one program; returns what was seen.

    An answer that differs once and not again is noted (``.fuzz/once.json``) and no failure: who shares a batch is not
    in the program. A server that dies, or whose books do not add up, always is one.

    Raises:
        Failed: something differs from plain SGLang, or is unsound.
    """
    runs = []
    for name in ("once", "last"):
        runs.append(Run(fleet, tokenizer, document_ids))
        problems = runs[-1].run(program)
        if not problems:
            break
        FAILING.mkdir(exist_ok=True)
        (FAILING / f"{name}.json").write_text(json.dumps(program, indent=1))
        (FAILING / f"{name}.txt").write_text(words := "\n".join(problems))
        if runs[-1].is_unsound or name == "last":
            raise Failed(f"{words}\n\nThe program, to keep:\n{json.dumps(program)}")
    return runs[0].counts + Counter({"differed once": len(runs) - 1})


def search(fleet: Fleet, tokenizer, document_ids, number: int, examples: int, seconds: float = 1e9) -> Counter:
    """Run the programs of one seed; a failing one is made smaller while there is time.

    Returns:
        What was seen, the number of programs among it.
    """
    end = time.monotonic() + seconds
    counts: Counter = Counter()
    has_failed = False

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, report_multiple_bugs=False, verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs)
    def run(program):
        nonlocal has_failed
        if has_failed or time.monotonic() < end:  # a failing one is run until it is small
            counts["programs"] += 1
            try:
                counts.update(check(fleet, tokenizer, document_ids, program))
            except Exception:
                has_failed = True
                raise

    run()
    return counts


def main() -> int:
    from transformers import AutoTokenizer

    from sglang_metasoft.demo import model as demo_model
    from tests.conftest import DEMO_FOLDER, make_first_layers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--variant", choices=VARIANTS, help="flags of the servers; default: by the seed")
    parser.add_argument("--replay", nargs="*", type=Path, help="run these programs alone")
    args = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if args.seed is None else args.seed
    variant = args.variant or sorted(VARIANTS)[first % len(VARIANTS)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped too
    model = make_first_layers(demo_model.prepare(DEMO_FOLDER / demo_model.NAME))
    tokenizer = AutoTokenizer.from_pretrained(model)
    document_ids = tokenizer(DOCUMENT.read_text())["input_ids"]
    folder = Path(tempfile.mkdtemp())
    print(f"SEED={first} variant {variant}; the servers' logs: {folder}", flush=True)
    with Fleet(model, folder, variant) as fleet:
        for path in args.replay or ():
            print(path, Run(fleet, tokenizer, document_ids).run(json.loads(path.read_text())))
        if args.replay:
            return 0
        end, counts, number = time.monotonic() + args.seconds, Counter(), first
        while time.monotonic() < end:
            counts += search(fleet, tokenizer, document_ids, number, EXAMPLES_AT_ONCE, end - time.monotonic())
            number += 1
            print(dict(sorted(counts.items())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
