"""Cases -> prepared cases: keys, values and target maps, computed once by the frozen model and kept on disk."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sglang_metasoft.train.attention import Watch
from sglang_metasoft.train.backbone import Backbone, Layers
from sglang_metasoft.train.cases import Case

QUESTION_SHARE = 0.25  # of a question-after target: the question's own rows, the rest is the answer's


class Context(NamedTuple):
    """Something to compress, and what matters in it."""

    layers: Layers  # KV that the probe sees
    span_ids: torch.Tensor  # [S]
    last_ids: torch.Tensor  # [window] ids before the probe
    at_boundary: bool  # nothing is known of what will be asked
    target: torch.Tensor  # [layers, G, S] float32: attention that should survive
    answers: list[tuple[list[int], list[int]]]  # (ids after the context, their answer) for validation

    @property
    def raw_ids(self) -> torch.Tensor:
        """All ids before the probe."""
        return self.span_ids if self.at_boundary else torch.cat([self.span_ids, self.last_ids])


class Prepared:
    """One case: the prefix's KV, every question's KV, and the maps of its answer.

    Tensors: ``keys``, ``values`` ``[layers, G, C, d]``; for question n ``keys.n``, ``values.n`` ``[layers, G, q, d]``,
    ``asked.n``, ``answered.n`` ``[layers, G, C + q]``; ``repeated`` ``[layers, G, C]`` if the case asks for it.
    """

    def __init__(self, case: Case, tensors: dict[str, torch.Tensor], answers: list[list[int]]) -> None:
        self.case, self.tensors, self.answers = case, tensors, answers

    def _layers(self, *suffixes: str) -> Layers:
        def joined(name: str) -> torch.Tensor:
            return torch.cat([self.tensors[name + suffix] for suffix in suffixes], dim=2)

        return Layers(zip(joined("keys"), joined("values"), strict=True))

    def inside(self, number: int, window: int) -> Context:
        """Question ``number`` is part of the prompt, and its answer is to come."""
        ids = self.case.prefix + self.case.questions[number]
        span = len(ids) - window
        return Context(
            layers=self._layers("", f".{number}"),
            span_ids=torch.tensor(ids[:span]),
            last_ids=torch.tensor(ids[span:]),
            at_boundary=False,
            target=self.tensors[f"answered.{number}"][..., :span].float(),
            answers=[([], self.answers[number])],
        )

    def boundary(self, window: int) -> Context:
        """Only the prefix is known; all questions, and its repetition, are to come."""
        length = len(self.case.prefix)
        maps = [
            QUESTION_SHARE * _share(self.tensors[f"asked.{n}"][..., :length])
            + (1 - QUESTION_SHARE) * _share(self.tensors[f"answered.{n}"][..., :length])
            for n in range(len(self.answers))
        ]
        target = _share(torch.stack(maps).amax(0))
        if "repeated" in self.tensors:
            target = (target + _share(self.tensors["repeated"])) / 2
        ids = torch.tensor(self.case.prefix)
        return Context(
            layers=self._layers(""),
            span_ids=ids,
            last_ids=ids[-window:],
            at_boundary=True,
            target=target,
            answers=list(zip(self.case.questions, self.answers, strict=True)),
        )


SINKS = 4


def _share(attention: torch.Tensor) -> torch.Tensor:
    """Without the sinks, which stay anyway, and summing to one."""
    attention = attention.float().clone()
    attention[..., :SINKS] = 0
    return attention / attention.sum(-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def prepare(backbone: Backbone, case: Case, max_answer_tokens: int) -> Prepared:
    """Run the model over a case; answers that the case leaves open are generated greedily."""
    prefix = Layers.of(backbone.prefill(case.prefix).layers)
    length = len(case.prefix)
    tensors = _entries(prefix, "")
    answers = []
    open_questions = [q for q, answer in zip(case.questions, case.answers, strict=True) if answer is None]
    own = iter(backbone.answers(prefix, open_questions, max_answer_tokens) if open_questions else ())
    for number, (question, answer) in enumerate(zip(case.questions, case.answers, strict=True)):
        if answer is None:
            answer = before_loop(next(own))
        answer = answer[:max_answer_tokens] or [backbone.tokenizer.eos_token_id]
        answers.append(answer)
        rows = question + answer[:-1]
        asked = torch.arange(len(rows), device=backbone.device) < len(question) - 1
        watch = Watch(length, torch.stack([asked, ~asked]))
        _, seen = backbone.rows(backbone.tensor(rows), prefix, watch)
        end = length + len(question)
        maps = torch.stack(watch.means)[..., :end].to(torch.bfloat16)  # [layers, 2, G, C + q]
        tensors |= {f"asked.{number}": maps[:, 0], f"answered.{number}": maps[:, 1]}
        tensors |= _entries(Layers((k[:, length:end], v[:, length:end]) for k, v in seen), f".{number}")
    if case.repeat_request:
        rows = case.repeat_request + case.prefix[case.repeat_from :]
        marked = torch.arange(len(rows), device=backbone.device) >= len(case.repeat_request)
        watch = Watch(length, marked[None], maximum=True)
        backbone.rows(backbone.tensor(rows), prefix, watch)
        tensors["repeated"] = torch.stack(watch.maxima).to(torch.bfloat16)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return Prepared(case, tensors, answers)


def before_loop(ids: list[int], run: int = 4, times: int = 2) -> list[int]:
    """An answer up to where it only repeats itself: where a run of ids comes for the second time in a row, or third."""
    for period in range(1, 13):
        least = max(period * times, period + run)
        for end in range(least, len(ids) + 1):
            start = end - least
            if all(ids[n] == ids[n + period] for n in range(start, end - period)):
                return ids[: start + period]
    return ids


def _entries(layers: Layers, suffix: str) -> dict[str, torch.Tensor]:
    keys, values = (torch.stack([layer[which].cpu() for layer in layers]).to(torch.bfloat16) for which in (0, 1))
    return {f"keys{suffix}": keys.contiguous(), f"values{suffix}": values.contiguous()}


@torch.no_grad()
def compute_entries(backbone: Backbone, case: Case) -> dict[str, torch.Tensor]:
    """The keys and values of a prepared case, computed again: a prefill, in place of 2 layers G d 2 bytes a token."""
    prefix = Layers.of(backbone.prefill(case.prefix).layers)
    length, tensors = len(case.prefix), _entries(prefix, "")
    for number, question in enumerate(case.questions):
        _, seen = backbone.rows(backbone.tensor(question), prefix)
        tensors |= _entries(Layers((k[:, length:], v[:, length:]) for k, v in seen), f".{number}")
    return tensors


class Store:
    """Prepared cases on disk, under the digest of the case: one file each, written whole or not at all.

    Args:
        keeps_entries: write keys and values too; else only answers and attention maps, and they are computed again.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, backbone: Backbone, max_answer_tokens: int, keeps_entries: bool = True) -> None:
        self.folder, self.backbone, self.max_answer_tokens = folder, backbone, max_answer_tokens
        self.keeps_entries = keeps_entries
        check = backbone.embed(torch.arange(8, device=backbone.device)).float().sum().item()
        self.model = f"{backbone.shape} {check:.6g} {max_answer_tokens}"

    def file(self, case: Case) -> Path:
        digest = hashlib.sha256(json.dumps([self.model, case._asdict()]).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.safetensors"

    def get(self, case: Case) -> Prepared:
        """The prepared case, from disk or from the model."""
        file = self.file(case)
        if not file.is_file():
            prepared = prepare(self.backbone, case, self.max_answer_tokens)
            tensors = dict(prepared.tensors)
            tensors |= {f"answer.{n}": torch.tensor(answer) for n, answer in enumerate(prepared.answers)}
            if not self.keeps_entries:
                tensors = {name: t for name, t in tensors.items() if not name.startswith(("keys", "values"))}
            write_atomically(file, lambda path: save_file(tensors, path))
            return prepared
        tensors = load_file(file)
        answers = [tensors.pop(f"answer.{n}").tolist() for n in range(len(case.questions))]
        if "keys" not in tensors:
            tensors |= compute_entries(self.backbone, case)
        return Prepared(case, tensors, answers)


def write_atomically(file: Path, write) -> None:
    """Call ``write(path)`` for a temporary file beside ``file`` and rename it: readers see the old or the new one.

    Raises:
        ValueError: it could not be written, for instance because the disk is full; ``file`` is as it was.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
    except Exception as error:  # safetensors has its own error type for a full disk
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{file} could not be written: {error}") from None
