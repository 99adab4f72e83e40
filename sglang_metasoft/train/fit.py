"""``sglang-metasoft fit MODEL``: data, training, report, and the compressor where servers find it, in a given time."""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import psutil
import torch

from sglang_metasoft.compressor.files import CONFIG_NAME, WEIGHTS_NAME
from sglang_metasoft.compressor.find import cache_folder, find_compressors
from sglang_metasoft.config import shown
from sglang_metasoft.hf.shape import kv_bytes_per_entry, read_shape
from sglang_metasoft.train.settings import DTYPES, TrainSettings
from sglang_metasoft.types import ModelShape

GIB = 2**30
DEFAULT_MINUTES, LEAST_MINUTES = 25.0, 2.0
PREPARE_SHARE, REPORT_SHARE = 0.4, 0.15  # of the time; the rest trains
LEAST_CASES, MOST_CASES = 16, 240
LEAST_STEPS, MOST_STEPS = 40, 900
PACE_STEPS = 3
OWN_DOCUMENTS, OWN_DOCUMENT_TOKENS = 16, 700  # that the model writes itself, if the time allows
OWN_DOCUMENTS_SHARE = 0.06  # of the time
REPORT_CASES = 12
MOST_ENTRIES_BYTES = 8 * GIB  # keys and values of prepared prompts on disk; of models with more, they are recomputed
LEAST_FREE_BYTES = 2 * GIB  # of disk
MAX_PREFIX_TOKENS = 1000
PLAN = "plan.json"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: an argument, the model or the machine cannot be used; one sentence.
    """
    args = _parse(argv)
    try:
        fit(args)
    except KeyboardInterrupt:
        print("sglang-metasoft fit: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglang-metasoft fit",
        description="Make a compressor for a model and put it where `--enable-metasoft` finds it. Run again after an "
        "interruption, it goes on.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face causal language model: folder or hub id")
    parser.add_argument(
        "--data", type=Path, action="append", default=[],
        help="your texts or chats (a folder of text files, or JSONL rows with text or messages); default: what is here",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES,
        help=f"time to use, the loading of the model not counted (default: {DEFAULT_MINUTES:g})",
    )  # fmt: skip
    parser.add_argument(
        "--most-minutes", type=float,
        help="refuse a model for which the least that is useful takes longer, by the time of the first prompt",
    )  # fmt: skip
    parser.add_argument("--if-missing", action="store_true", help="do nothing if servers find a compressor for it")
    parser.add_argument("--output", type=Path, help="folder of the compressor (default: where servers look)")
    parser.add_argument("--work", type=Path, help="folder for what is in progress (default: beside the compressor)")
    parser.add_argument("--exclude", type=Path, action="append", default=[], help="held-out text: folder or file")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.minutes >= LEAST_MINUTES:
        raise ValueError(f"--minutes: {args.minutes:g} is not allowed; allowed: at least {LEAST_MINUTES:g}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: {args.device!r} is not there; allowed: cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def fit(args: argparse.Namespace) -> Path:
    """Everything, step by step.

    Returns:
        The compressor's folder; with ``--if-missing`` maybe that of one which was there.

    Raises:
        ValueError: as :func:`main`.
    """
    shape = read_shape(args.model)
    name = Path(args.model.rstrip("/")).name or "model"
    run = [shape._asdict(), *map(str, (args.data, args.exclude)), args.minutes, args.seed, args.dtype]
    work = args.work or cache_folder() / f".fit-{name}-{_digest(run)}"
    _check_machine(work, shape, args)

    from accelerate import Accelerator

    from sglang_metasoft.train.backbone import Backbone

    backbone = Backbone(args.model, torch.device(args.device), getattr(torch, args.dtype))
    if args.if_missing and (found := find_compressors(shape, backbone.embed, backbone.device)):
        print(f"nothing is fitted, there is a {found[0].description}")
        return Path(found[0].path)
    print(_estimate(backbone, args), flush=True)
    session = _Session(args, backbone, work)
    session.check_time()
    session.prepare()
    trainer = session.train(Accelerator(cpu=args.device == "cpu"))
    rows = backbone.embed(torch.arange(8, device=backbone.device)).float().sum().item()
    target = args.output or cache_folder() / f"{name}-{_digest([shape._asdict(), f'{rows:.5g}'])}"
    session.report_and_export(trainer, target)
    shutil.rmtree(work, ignore_errors=True)
    print(f"compressor: {target}\nreport: {target / 'report.html'}")
    print(f"serve it: python -m sglang.launch_server --model-path {args.model} --enable-metasoft")
    return target


class _Session:
    """One run; what it decided is kept in ``plan.json``, so that a continued run decides the same."""

    def __init__(self, args: argparse.Namespace, backbone, work: Path) -> None:
        from sglang_metasoft.train.dataset import Dataset
        from sglang_metasoft.train.prepare import Store
        from sglang_metasoft.train.texts import HeldOut, read_held_out

        self.args, self.backbone, self.work = args, backbone, work
        self.seconds = 60 * args.minutes
        self.plan = json.loads((work / PLAN).read_text()) if (work / PLAN).is_file() else {}
        self.start = time.monotonic()
        texts, chats = self._texts()
        held_out = HeldOut(text for path in args.exclude for text in read_held_out(path))
        settings = self._settings(1, 1)
        self.dataset = Dataset(
            backbone.tokenizer, texts, chats,
            lengths=(settings.min_prefix_tokens, settings.max_prefix_tokens), window=settings.window,
            repeat_share=settings.repeat_share, answer_tokens=settings.answer_tokens, seed=args.seed,
            held_out=held_out,
        )  # fmt: skip
        self.store = Store(
            work / "prepared", backbone, settings.answer_tokens, keeps_entries=_kept_bytes(backbone.shape) > 0
        )

    def _note(self, **decided) -> None:
        from sglang_metasoft.train.prepare import write_atomically

        self.plan |= decided
        write_atomically(self.work / PLAN, lambda path: path.write_text(json.dumps(self.plan)))

    def _texts(self) -> tuple[list[str], list]:
        from sglang_metasoft.train.own_texts import found_here, written_by
        from sglang_metasoft.train.texts import read_corpus

        if self.args.data:
            corpora = [read_corpus(path) for path in self.args.data]
            return [text for texts, _ in corpora for text in texts], [chat for _, chats in corpora for chat in chats]
        if "documents" not in self.plan:
            print("the model writes some documents", flush=True)
            wanted = OWN_DOCUMENTS if self.seconds * OWN_DOCUMENTS_SHARE >= 60 or self.args.device != "cpu" else 0
            self._note(
                documents=written_by(self.backbone, wanted, OWN_DOCUMENT_TOKENS, self.args.seed) if wanted else []
            )
        return found_here() + [text for text in self.plan["documents"] if len(text) > 1500], []

    def _settings(self, cases: int, steps: int) -> TrainSettings:
        return TrainSettings(
            model=self.args.model, data=self.work, output=self.work, cases=cases, steps=steps, selector_steps=0,
            max_prefix_tokens=MAX_PREFIX_TOKENS, repeat_share=0.3, seed=self.args.seed, dtype=self.args.dtype,
            device=self.args.device, validate_every=10**9,
        )  # fmt: skip

    def check_time(self) -> None:
        """Say how long the least that is useful takes, by the time of the first prompt.

        Raises:
            ValueError: longer than ``--most-minutes``.
        """
        if "prompt_seconds" not in self.plan:
            began = time.monotonic()
            self.store.get(self.dataset[0])
            self._note(prompt_seconds=time.monotonic() - began)
        # A step of training took less than a prompt's preparation wherever both were measured.
        least = self.plan["prompt_seconds"] * (LEAST_CASES + REPORT_CASES + LEAST_STEPS) / 60
        if self.args.most_minutes is not None and least > self.args.most_minutes:
            raise ValueError(
                f"model path: {shown(self.args.model)} would take about {least:.0f} minutes on {self.args.device} at "
                f"the least; allowed: {self.args.most_minutes:g} (--most-minutes)"
            )
        print(f"a prompt takes {self.plan['prompt_seconds']:.1f} s, so {least:.0f} minutes are the least", flush=True)

    def prepare(self) -> None:
        """Answers and attention maps of as many prompts as the time allows."""
        from tqdm import tqdm

        end = self.start + PREPARE_SHARE * self.seconds
        most = self.plan.get("cases", MOST_CASES)
        bar = tqdm(range(most), desc="prompts", unit="prompt")
        done = 0
        for number in bar:
            if "cases" not in self.plan and number >= LEAST_CASES and time.monotonic() > end:
                break
            self.store.get(self.dataset[number])
            done = number + 1
        bar.close()
        self._note(cases=done, prepare_seconds=self.plan.get("prepare_seconds") or time.monotonic() - self.start)

    def train(self, accelerator):
        """Train for the time that is left, the report's share taken off."""
        from sglang_metasoft.train.curves import Curves
        from sglang_metasoft.train.trainer import Trainer

        if "steps" not in self.plan:
            pace = self.work / "pace"
            shutil.rmtree(pace, ignore_errors=True)
            settings = dataclasses.replace(self._settings(self.plan["cases"], PACE_STEPS), output=pace)
            trainer = Trainer(settings, self.backbone, self.dataset, self.store, accelerator)
            began = time.monotonic()
            trainer.run(Curves(pace, 0, active=False), lambda student: {"none": 0.0})
            step_seconds = (time.monotonic() - began) / PACE_STEPS
            shutil.rmtree(pace, ignore_errors=True)
            left = self.start + (1 - REPORT_SHARE) * self.seconds - time.monotonic()
            self._note(steps=int(min(max(left / step_seconds, LEAST_STEPS), MOST_STEPS)), step_seconds=step_seconds)
        settings = self._settings(self.plan["cases"], self.plan["steps"])
        trainer = Trainer(settings, self.backbone, self.dataset, self.store, accelerator)
        trainer.run(Curves(self.work, trainer.step), lambda student: {"none": 0.0})
        return trainer

    def report_and_export(self, trainer, target: Path) -> None:
        """Measure on prompts never trained on, and put everything in place, whole or not at all."""
        from sglang_metasoft.train import card
        from sglang_metasoft.train.export import export
        from sglang_metasoft.train.validate import FIRST_VALIDATION_CASE, ranking

        def contexts():
            for number in range(self.plan.get("report_cases", REPORT_CASES)):
                prepared = self.store.get(self.dataset[FIRST_VALIDATION_CASE + number])
                yield prepared.case.family, prepared.inside(0, trainer.settings.window)
                yield prepared.case.family, prepared.boundary(trainer.settings.window)

        fitted = "fitted"
        rows = card.measure(self.backbone, contexts(), {fitted: ranking(trainer.result)} | card.BASELINES)
        cells = card.summarize(rows)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True, mode=0o755)
            export(trainer.result, self.backbone, draft, report=card.short(cells, fitted))
            facts = {
                "model": self.args.model, "device": self.args.device, "dtype": self.args.dtype, "seed": self.args.seed,
                "minutes": round((time.monotonic() - self.start) / 60, 1), "training prompts": self.plan["cases"],
                "steps": self.plan["steps"], "peak memory of this process, GiB": round(_peak_bytes() / GIB, 1),
                "texts": ", ".join(map(str, self.args.data)) or "found here, and written by the model",
            }  # fmt: skip
            card.write(draft, cells, facts, fitted)
            for name in (WEIGHTS_NAME, CONFIG_NAME, "report.json", "report.html"):
                target.mkdir(parents=True, exist_ok=True, mode=0o755)
                os.replace(draft / name, target / name)
        except OSError as error:
            raise ValueError(f"--output: {shown(str(target))} cannot be written: {error}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(card.text(cells, fitted))


def _digest(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]


def _kept_bytes(shape: ModelShape) -> int:
    """What keys and values of all prompts take on disk; 0 where they are computed again instead."""
    found = MOST_CASES * MAX_PREFIX_TOKENS * kv_bytes_per_entry(shape, torch.bfloat16)
    return found if found <= MOST_ENTRIES_BYTES else 0


def _check_machine(work: Path, shape: ModelShape, args: argparse.Namespace) -> None:
    """Raise ValueError unless there is a place to write, and room on disk and in memory."""
    try:
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(work).free
    except OSError as error:
        raise ValueError(f"--work: {shown(str(work))} cannot be written: {error}; allowed: a folder of yours") from None
    if not os.access(work, os.W_OK):
        raise ValueError(f"--work: {shown(str(work))} cannot be written; allowed: a folder of yours")
    needed = _kept_bytes(shape) + LEAST_FREE_BYTES
    if free < needed:
        raise ValueError(
            f"--work: {free / GIB:.1f} GiB are free in {shown(str(work))}; allowed: a folder with {needed / GIB:.1f}"
        )
    folder = Path(args.model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    needed = weights * (2 if args.dtype == "float32" else 1) + GIB
    if args.device == "cpu":
        available = psutil.virtual_memory().available
    else:
        available = torch.cuda.mem_get_info(torch.device(args.device))[0]
    if available < needed:
        raise ValueError(
            f"model path: {shown(args.model)} takes about {needed / GIB:.1f} GiB of memory on {args.device}; allowed: "
            f"a model that fits the {available / GIB:.1f} GiB that are free"
        )


def _estimate(backbone, args: argparse.Namespace) -> str:
    """Time, memory and disk, before anything starts."""
    shape = backbone.shape
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    # Of the longest prompt: its entries in float32 twice, and the probe's attention with gradients.
    prompt = (
        3
        * MAX_PREFIX_TOKENS
        * (4 * kv_bytes_per_entry(shape, torch.bfloat16) + 8 * shape.num_layers * shape.num_heads * 32)
    )
    return (
        f"fit {args.model} on {args.device} in {args.dtype}: about {args.minutes:g} minutes, "
        f"{(weights + prompt) / GIB + 1:.1f} GiB of memory ({weights / GIB:.1f} GiB of them weights), "
        f"at most {(_kept_bytes(shape) + LEAST_FREE_BYTES) / GIB:.1f} GiB of disk while it runs"
    )


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
