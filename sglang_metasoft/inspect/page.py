"""An :class:`Inspection` as one HTML page that needs nothing else: style, program and data are inside."""

import base64
import html
import json
from importlib.resources import files
from string import Template

from sglang_metasoft.inspect.inspection import LOG2_FLOOR, LOG2_STEPS, WEIGHT_STEPS, Inspection, pack

# In this order one program; the parts share their names.
PROGRAM = ("data.js", "prompt.js", "flows.js", "detail.js", "map.js", "answers.js", "controls.js")


def render(inspection: Inspection) -> bytes:
    """The page in UTF-8. Text from prompt and model reaches it escaped, as data; the page sets it as text only."""
    folder = files("sglang_metasoft.inspect") / "page"
    arrays = {"importance": inspection.importance, "rank": inspection.rank}
    for number, result in enumerate(inspection.results):
        arrays |= {f"targets{number}": result.targets, f"weights{number}": result.weights}
    blobs = [
        f'<script type="text/plain" id="array-{name}">{base64.b64encode(pack(array)).decode()}</script>'
        for name, array in arrays.items()
    ]
    page = Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(inspection.title),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        program="\n".join((folder / name).read_text(encoding="utf-8") for name in PROGRAM),
        data=script_json(describe(inspection)),
        arrays="\n".join(blobs),
    )
    return page.encode("utf-8", errors="replace")


def script_json(value) -> str:
    """JSON that may stand inside ``<script>``: no ``<``, so that no text can end the element or open a comment."""
    return json.dumps(value).replace("<", "\\u003c")


def describe(inspection: Inspection) -> dict:
    """All but the arrays."""
    plan = inspection.results[0].plan
    *texts, plain_text = inspection.answer_texts
    results = [
        {
            "ratio": result.ratio,
            "kept": result.plan.kept_slots,
            "targets": result.targets.shape[-1],
            "answer": _answer(result.answer, text),
        }
        for result, text in zip(inspection.results, texts, strict=True)
    ]
    return {
        "title": inspection.title,
        "facts": inspection.facts,
        "tokens": inspection.prompt.texts,
        "spanTokens": plan.span_tokens,
        "sinkTokens": plan.sink_tokens,
        "layers": inspection.num_layers,
        "heads": inspection.num_kv_heads,
        "bytesPerEntry": inspection.kv_bytes_per_entry,
        "gateScale": [round(float(scale), 5) for scale in inspection.gate_scale],
        "steps": inspection.steps,
        "results": results,
        "plain": _answer(inspection.plain, plain_text),
        "rankBytes": inspection.rank.itemsize,
        "log2Floor": LOG2_FLOOR,
        "log2Steps": LOG2_STEPS,
        "weightSteps": WEIGHT_STEPS,
    }


def _answer(answer, text: str) -> dict:
    return {"text": text, "tokens": len(answer.ids), "isEnded": answer.is_ended, "score": round(answer.score, 4)}
