"""Judge Q (arXiv 2509.10798): the same trained soft tokens probe every prompt."""

from sglang_metasoft.compressor.files import check_compressor
from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import ModelShape, Probe, Prompt


class JudgeQ(Method):
    """Static soft tokens appended after the prompt; what they attend to stays. Nothing is merged, as in the paper."""

    default_consolidation = "none"
    reads_path = True

    @classmethod
    def check(cls, config, shape: ModelShape, tp_size: int) -> None:
        super().check(config, shape, tp_size)
        cls._check_path(config)
        check_compressor(config.path, shape, method="judge_q")

    def __init__(self, config, shape: ModelShape, embed, device) -> None:
        super().__init__(config, shape, embed, device)
        self._check_path(config)
        self.static_tokens = StaticTokens.load(config.path, shape, embed, device)

    @staticmethod
    def _check_path(config) -> None:
        if config.path is None:
            raise ValueError("metasoft method: judge_q has nothing untrained to fall back on; give --metasoft-path")

    def follow_weights(self, model):
        self.static_tokens.check_again()  # the file is as it was
        self.prepare(model)
        return self

    @property
    def identity(self) -> str:
        return f"JudgeQ:{self.static_tokens.fingerprint}"

    @property
    def description(self) -> str:
        return f"{self.static_tokens.count} trained static soft tokens ({self.config.path})"

    def probe(self, prompt: Prompt) -> Probe:
        return Probe(
            embeds=self.static_tokens.tokens,
            context_slots=prompt.context_slots,
            first_position=prompt.context_tokens,
        )
