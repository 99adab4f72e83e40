"""The settings of one training run, checked on construction."""

import dataclasses
from pathlib import Path

from sglang_metasoft.config import METHODS
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.consolidations.key_bias import KeyBias
from sglang_metasoft.methods import load_method
from sglang_metasoft.methods.judge_q import JudgeQ
from sglang_metasoft.methods.metasoft import MetaSoft
from sglang_metasoft.train.objective import MAP_LOSSES

TRAINED_METHODS = tuple(name for name in METHODS if load_method(name).reads_path)
FEATURES = {"both": (True, True), "span": (True, False), "tail": (False, True), "none": (False, False)}
DTYPES = ("float32", "bfloat16")
CUTS = ("span", "prompt")
RECKONED_CONSOLIDATIONS = ("none", "key_bias")  # that the losses know
CHOICES = {
    "method": TRAINED_METHODS, "dtype": DTYPES, "selector_features": tuple(FEATURES), "map_loss": MAP_LOSSES,
    "answer_cut": CUTS, "consolidation": ("auto", *RECKONED_CONSOLIDATIONS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What ``sglang-metasoft train`` is told; every field is a flag.

    Raises:
        ValueError: a value is outside its allowed range; the message names both.
    """

    model: str
    data: Path
    output: Path
    method: str = "metasoft"
    soft_tokens: int = 32
    selector_features: str = "both"  # what soft tokens are composed by: span, tail, both or none
    scorer_width: int = 32  # of the entry scorer; 0: the probe's attention alone, as in the paper
    cases: int = 240  # distinct prompts, prepared once and kept on disk
    steps: int = 600  # library and selector together
    selector_steps: int = 60  # library frozen
    batch: int = 2  # contexts a step and process; every second one ends at a boundary
    learning_rate: float = 0.02
    average: float = 0.99  # of the weights over the steps: decay of an exponential mean; 0: the last step's weights
    orthogonality: float = 0.05
    map_loss: str = "kl"  # between target and importance; squared: the paper's
    lost_weight: float = 1.0  # of the attention lost at a cut, beside the divergence
    answer_weight: float = 1.0  # of the change in the answers' next-token distributions; 0: attention maps alone
    answer_cut: str = "span"  # what the answers' cut goes by: the span, or the whole prompt's budget as in the server
    consolidation: str = "auto"  # that losses and validation reckon with; auto: as served
    ratios: tuple[float, ...] = (3.0, 4.0, 4.0, 8.0, 8.0, 16.0)  # of the soft cut; each context draws one of them
    gate: float = 0.0  # scale of the consolidation's gate, not trained; 1: the paper's, which raised the answers' loss
    min_prefix_tokens: int = 350
    max_prefix_tokens: int = 800
    answer_tokens: int = 48
    repeat_share: float = 0.6
    window: int = 64
    validation_cases: int = 8
    validate_every: int = 150
    checkpoint_every: int = 25
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    init: tuple[Path, ...] = ()  # compressors whose mean to start from, in place of rows of the embedding table
    prepared: Path | None = None  # folder of prepared cases; default: inside the output folder
    exclude: tuple[Path, ...] = ()  # held-out text; passages that share 13 words in a row are passed over

    def __post_init__(self) -> None:
        least = dict(
            soft_tokens=1, scorer_width=0, cases=1, steps=0 if self.init else 1, selector_steps=0, batch=1,
            min_prefix_tokens=64, max_prefix_tokens=self.min_prefix_tokens, answer_tokens=1, window=1,
            validation_cases=1, validate_every=1, checkpoint_every=1, learning_rate=1e-9, orthogonality=0,
            lost_weight=0, answer_weight=0, gate=0, repeat_share=0,
        )  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"train {name}: {getattr(self, name)!r} is not allowed; allowed: at least {low}")
        if not 0 <= self.average < 1:
            raise ValueError(f"train average: {self.average!r} is not allowed; allowed: from 0 to below 1")
        for ratio in self.ratios or [None]:
            if ratio is None or not 1 < ratio < float("inf"):
                raise ValueError(f"train ratios: {ratio!r} is not allowed; allowed: one number above 1, or several")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"train {name}: {getattr(self, name)!r} is not allowed; allowed: one of: {', '.join(allowed)}"
                )
        if self.selector_features != "both" and (self.init or self.method != "metasoft"):
            raise ValueError(
                f"train selector_features: {self.selector_features!r} with "
                f"{f'init {self._init_paths()!r}' if self.init else f'method {self.method}'}; "
                f"allowed: 'both', or a new compressor of method metasoft"
            )
        if self.method == "judge_q" and self.orthogonality:
            object.__setattr__(self, "orthogonality", 0.0)

    @property
    def total_steps(self) -> int:
        """Both stages; static soft tokens have one."""
        return self.steps + (self.selector_steps if self.method == "metasoft" else 0)

    @property
    def biases_keys(self) -> bool:
        """Whether the compressor is trained for a consolidation that biases keys."""
        return issubclass(load_consolidation(self._consolidation_name), KeyBias)

    @property
    def _consolidation_name(self) -> str:
        if self.consolidation != "auto":
            return self.consolidation
        is_metasoft = self.method == "metasoft"
        return MetaSoft.consolidation_of_gate(not self.gate) if is_metasoft else JudgeQ.default_consolidation

    def fingerprint(self) -> dict:
        """What must not change between an interrupted run and its continuation."""
        free = {"output", "validate_every", "checkpoint_every", "prepared", "device", "validation_cases"}
        values = dataclasses.asdict(self) | {"init": self._init_paths() or None}
        return {k: str(v) for k, v in values.items() if k not in free}

    def _init_paths(self) -> str:
        return " ".join(map(str, self.init))
