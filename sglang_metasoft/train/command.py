"""``sglang-metasoft train``."""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from sglang_metasoft.train.settings import CHOICES, TrainSettings

HELP = {
    "model": "Hugging Face causal language model: folder or hub id",
    "data": "training text: a folder of .txt, .md, .rst (also .gz) or .jsonl files, or one .jsonl file",
    "output": "folder of the run: checkpoint, curves, and the compressor when it is done",
    "method": "metasoft (library and selector) or judge_q (static soft tokens)",
    "soft_tokens": "soft tokens (k)",
    "selector_features": "what the selector reads: the mean embedding of the span, of the tail after it, both, or none",
    "scorer_width": "hidden width of the entry scorer; 0 for the paper's method",
    "cases": "distinct prompts; each is prepared once and kept on disk",
    "steps": "steps of stage 1: library and selector together",
    "selector_steps": "steps of stage 2: library frozen",
    "batch": "contexts a step and process; every second one ends at a boundary",
    "learning_rate": "of the soft tokens; other parts have fixed shares of it",
    "average": "decay of the exponential mean of the weights, which is what is kept; 0: the last weights",
    "orthogonality": "weight of the penalty on the library",
    "map_loss": "between the importance and the target map: kl, or squared (the paper's)",
    "lost_weight": "weight of the attention lost at a cut, beside the divergence",
    "answer_weight": "weight of the change in answers under a soft cut; 0: attention maps alone",
    "answer_cut": "the answers' soft cut is by the span, or by the prompt's budget less the raw window, as served",
    "consolidation": "what losses and validation reckon with; auto: key_bias for metasoft with gate 0, otherwise none",
    "ratios": "span tokens per kept entry that the losses cut at; each context draws one of these",
    "gate": "scale of the consolidation's gate in the compressor, not trained; 1: the paper's",
    "min_prefix_tokens": "shortest prefix",
    "max_prefix_tokens": "longest usual prefix; one in ten has up to three times as many tokens",
    "answer_tokens": "most tokens of an answer",
    "repeat_share": "share of prompts that are also repeated, for question-after targets",
    "window": "raw window of the server (--metasoft-window)",
    "validation_cases": "prompts for validation, never trained on",
    "validate_every": "steps between validations",
    "checkpoint_every": "steps between checkpoints",
    "seed": "of everything random",
    "dtype": "of the frozen model",
    "device": "cpu, cuda, or cuda:N; several GPUs: `accelerate launch -m sglang_metasoft.cli train ...`",
    "init": "compressor of the same method to start from; of several, their mean (alone: --steps 0 --selector-steps 0)",
    "prepared": "where prepared prompts are kept (default: OUTPUT/prepared)",
    "exclude": "held-out text (folder or file); passages sharing 13 words in a row with it are passed over",
}
SEVERAL = {"ratios": float, "init": Path}  # flags that take one value or more


def main(argv: list[str]) -> int:
    """``sglang-metasoft train``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sglang-metasoft train", description="Train a compressor.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of :class:`TrainSettings`."""
    kinds = get_type_hints(TrainSettings)
    for field in dataclasses.fields(TrainSettings):
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"help": HELP[field.name]}
        default: Any = field.default
        if field.name == "exclude":
            parser.add_argument(flag, type=Path, action="append", default=[], **options)
            continue
        if field.name in SEVERAL:
            if default:
                options["help"] += f" (default: {' '.join(f'{value:g}' for value in default)})"
            parser.add_argument(flag, type=SEVERAL[field.name], nargs="+", default=default, **options)
            continue
        kind = Path if field.name == "prepared" else kinds[field.name]
        if field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        if default is dataclasses.MISSING:
            parser.add_argument(flag, type=kind, required=True, **options)
        else:
            options["help"] += "" if default is None else f" (default: {default})"
            parser.add_argument(flag, type=kind, default=default, **options)


def run(args: argparse.Namespace) -> int:
    """Train, or continue an interrupted run; returns the exit code."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainSettings)}
    try:
        train(TrainSettings(**values | {name: tuple(values[name]) for name in ("exclude", *SEVERAL)}))
    except ValueError as error:
        print(f"sglang-metasoft train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "sglang-metasoft train: interrupted; the same command continues from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def train(settings: TrainSettings) -> dict[str, float]:
    """Run or resume one training.

    Returns:
        The last validation's scores.

    Raises:
        ValueError: bad data, a model that cannot be trained for, a full disk, settings that differ from those of the
            run in the output folder.
    """
    import torch
    from accelerate import Accelerator

    from sglang_metasoft.train.backbone import Backbone
    from sglang_metasoft.train.curves import Curves
    from sglang_metasoft.train.dataset import Dataset
    from sglang_metasoft.train.export import export
    from sglang_metasoft.train.prepare import Store
    from sglang_metasoft.train.texts import HeldOut, read_corpus, read_held_out
    from sglang_metasoft.train.trainer import Trainer
    from sglang_metasoft.train.validate import RANKERS, evaluate, ranking, validation_contexts

    accelerator = Accelerator(cpu=settings.device == "cpu")
    device = accelerator.device if settings.device != "cpu" else torch.device("cpu")
    if settings.device.startswith("cuda") and device.type != "cuda":
        raise ValueError(f"train device: {settings.device!r} is not there; allowed: cpu, or a GPU that torch sees")
    texts, chats = read_corpus(settings.data)
    held_out = HeldOut(itertools.chain.from_iterable(map(read_held_out, settings.exclude)))
    backbone = Backbone(settings.model, device, getattr(torch, settings.dtype))
    dataset = Dataset(
        backbone.tokenizer, texts, chats,
        lengths=(settings.min_prefix_tokens, settings.max_prefix_tokens), window=settings.window,
        repeat_share=settings.repeat_share, answer_tokens=settings.answer_tokens, seed=settings.seed,
        held_out=held_out,
    )  # fmt: skip
    store = Store(settings.prepared or settings.output / "prepared", backbone, settings.answer_tokens)
    trainer = Trainer(settings, backbone, dataset, store, accelerator)
    curves = Curves(settings.output, trainer.step, accelerator.is_main_process)

    def validate(student) -> dict[str, float]:
        rankers = RANKERS | {settings.method: ranking(student)}
        contexts = validation_contexts(dataset, store, settings)
        return evaluate(backbone, contexts, rankers, biases_keys=settings.biases_keys)

    scores = trainer.run(curves, validate)
    if accelerator.is_main_process:
        export(trainer.result, backbone, settings.output / "compressor")
        curves.draw(settings.output / "compressor" / "curves.png")
        (settings.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        print(f"compressor: {settings.output / 'compressor'}")
    return scores
