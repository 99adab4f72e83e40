"""Several caches read one answer, as one batch, in process."""

from sglang_metasoft.eval.fidelity import Reading
from sglang_metasoft.hf.cache import Batch
from sglang_metasoft.hf.model import HFModel, LayerKV


def read(
    model: HFModel, rows: list[list[LayerKV]], rest_ids: list[int], position: int, answer_ids: list[int]
) -> list[Reading]:
    """Read an answer over several caches, as one batch.

    Args:
        rows: for each cache its entries in all layers.
        rest_ids: the prompt's tokens that the caches lack; none: the answer's first token does not count.
        position: logical position of what comes next.
        answer_ids: the full cache's answer.
    """
    counted = len(answer_ids) - (not rest_ids)
    ids = rest_ids + answer_ids[:-1]
    if not counted:
        return [Reading(0, 0, 0.0) for _ in rows]
    logits = Batch(model, rows, len(ids)).extend(model.tensor(ids).expand(len(rows), -1), position, last=counted)
    targets = model.tensor(answer_ids[-counted:]).expand(len(rows), -1)
    losses = -logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    agreed = (logits.argmax(-1) == targets).sum(1)
    return [Reading(counted, right, loss) for right, loss in zip(agreed.tolist(), losses.mean(1).tolist(), strict=True)]
