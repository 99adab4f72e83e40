"""What is trained: soft tokens and entry scorer (metasoft), or static soft tokens (judge_q)."""

import torch
from metasoft_kernels.refine.naive import MASS_FLOOR, features
from torch import nn

from sglang_metasoft.compressor.soft_tokens import LIBRARY_ROWS, TAIL_TOKENS, SoftTokens
from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.train.attention import Probing
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.prepare import Context
from sglang_metasoft.train.settings import FEATURES

OWN_ROW_LOGIT, MEAN_ROW_LOGIT, OTHER_LOGIT_SCALE = 4.0, 3.0, 0.5


class Student(nn.Module):
    """Base: a probe for a context, and how its attention becomes log importance."""

    def tokens(self, backbone: Backbone, context: Context, noise: torch.Tensor | None) -> torch.Tensor:
        """``[k, D]`` soft tokens, with gradients."""
        raise NotImplementedError

    def refine(self, mass: torch.Tensor, context: Context, backbone: Backbone) -> torch.Tensor:
        """``[layers, G, S]`` log importance from attention ``[layers, G, S]``."""
        return mass.clamp_min(MASS_FLOOR).log()

    def carried(self, mass: torch.Tensor, log_importance: torch.Tensor) -> torch.Tensor:
        """``[layers, G, S]`` attention that entries stand for where keys are biased, as in the server."""
        return mass

    def probe(self, backbone: Backbone, context: Context, noise: torch.Tensor | None = None) -> torch.Tensor:
        """``[layers, G, S]`` attention that the soft tokens pay to the span."""
        probing = Probing(len(context.span_ids))
        backbone.rows(self.tokens(backbone, context, noise), context.layers, probing)
        return torch.stack(probing.importance)


class MetaSoftStudent(Student):
    """Meta-library, selector and entry scorer."""

    def __init__(self, soft: SoftTokens) -> None:
        super().__init__()
        self.soft = soft

    @classmethod
    @torch.no_grad()
    def create(cls, backbone: Backbone, count: int, scorer: int, features: str, seed: int) -> "MetaSoftStudent":
        """Library rows: the mean of the embedding table, then random rows of it, made orthonormal in this order.

        Each soft token starts as a row of its own plus a share of the mean. Features that the selector is not to read
        (:data:`sglang_metasoft.train.settings.FEATURES`) have weights of 0 and keep them.
        """
        shape, table = backbone.shape, backbone.table().float().cpu()
        rows = min(LIBRARY_ROWS, shape.hidden_size)
        generator = torch.Generator().manual_seed(seed)
        soft = SoftTokens(
            shape.hidden_size, rows, count, shape.num_layers, shape.num_kv_heads, scorer=scorer, head_dim=shape.head_dim
        )
        picked = table[torch.randperm(len(table), generator=generator)[: rows - 1]]
        q, r = torch.linalg.qr(torch.cat([table.mean(0, keepdim=True), picked]).t().double())
        soft.library.copy_((q * r.diagonal().sign()).t())
        soft.norm.fill_(table.norm(dim=-1).mean() * 1.5)
        for name, parameter in soft.named_parameters():
            if name.startswith(("trunk", "to_query", "row_keys")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
        reads = torch.tensor(FEATURES[features]).repeat_interleave(shape.hidden_size)
        soft.trunk.weight.mul_(reads)
        soft.trunk.weight.register_hook(lambda gradient: gradient * reads.to(gradient.device))
        soft.bias.copy_(torch.randn(soft.bias.shape[1:], generator=generator) * OTHER_LOGIT_SCALE)
        own = torch.arange(count)
        soft.bias[:, own, 1 + own % (rows - 1)] = OWN_ROW_LOGIT
        soft.bias[:, own, 0] = MEAN_ROW_LOGIT
        ids = torch.arange(len(soft.embedding_check)) * (shape.vocab_size // len(soft.embedding_check))
        soft.embedding_check.copy_(table[ids])
        return cls(soft)

    @classmethod
    def load(cls, backbone: Backbone, path: str) -> "MetaSoftStudent":
        """Go on from a compressor.

        Raises:
            ValueError: as :meth:`sglang_metasoft.compressor.soft_tokens.SoftTokens.load`.
        """
        soft = SoftTokens.load(path, backbone.shape, backbone.embed, backbone.device)
        return cls(soft.requires_grad_(True))

    @torch.no_grad()
    def calibrate(self, backbone: Backbone, contexts: list[Context], seed: int) -> None:
        """Set the entry scorer to the identity, its features standardised over some contexts."""
        if self.soft.scorer is None:
            return
        sums, squares, count = torch.zeros(()), torch.zeros(()), 0
        for context in contexts:
            x = features(self.probe(backbone, context), *entries(context, backbone))
            sums, squares, count = sums + x.sum(-2), squares + x.square().sum(-2), count + x.shape[-2]
        mean = sums / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        # Layers of a window are never asked: as if their features were standardised already.
        all_layers = backbone.shape.num_layers, *mean.shape[1:]
        means, deviations = mean.new_zeros(all_layers), mean.new_ones(all_layers)
        means[backbone.full_layers], deviations[backbone.full_layers] = mean, deviation
        self.soft.scorer.initialize(means, deviations, torch.Generator().manual_seed(seed))

    def tokens(self, backbone, context, noise):
        span, last = (ids.to(backbone.device) for ids in (context.span_ids, context.raw_ids[-TAIL_TOKENS:]))
        logits = self.soft.selection_logits(self.soft.features(backbone.embed, span, last), int(context.at_boundary))
        return self.soft.compose(logits if noise is None else logits + noise)

    def carried(self, mass, log_importance):
        if self.soft.scorer is None:
            return mass
        return ((mass.clamp_min(MASS_FLOOR).log() + log_importance.log_softmax(-1)) / 2).exp()

    def refine(self, mass, context, backbone):
        if self.soft.scorer is None:
            return super().refine(mass, context, backbone)
        return self.soft.scorer(mass, *entries(context, backbone), int(context.at_boundary), self._which(backbone))

    def _which(self, backbone: Backbone) -> tuple:
        """The scorer's layers: all, as they lie, or those that see all tokens."""
        full = backbone.full_layers
        return (slice(None) if len(full) == backbone.shape.num_layers else full,)


class JudgeQStudent(Student):
    """Judge Q: the same soft tokens for every context."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.static_tokens = nn.Parameter(tokens)

    @classmethod
    @torch.no_grad()
    def create(cls, backbone: Backbone, count: int, seed: int) -> "JudgeQStudent":
        table = backbone.table().float()
        picked = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:count]
        return cls(table[picked.to(table.device)].clone())

    @classmethod
    def load(cls, backbone: Backbone, path: str) -> "JudgeQStudent":
        """Go on from trained static soft tokens.

        Raises:
            ValueError: as :meth:`sglang_metasoft.compressor.static_tokens.StaticTokens.load`.
        """
        return cls(StaticTokens.load(path, backbone.shape, backbone.embed, backbone.device).tokens)

    def tokens(self, backbone, context, noise):
        return self.static_tokens


@torch.no_grad()
def mean_of(students: list[Student]) -> Student:
    """The first of them, with the mean of all weights: of runs that began at the same ones (arXiv 2203.05482).

    Raises:
        ValueError: they do not have the same tensors.
    """
    states = [student.state_dict() for student in students]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    for other in shapes[1:]:
        for name in sorted(shapes[0].keys() | other.keys()):
            if shapes[0].get(name) != other.get(name):
                raise ValueError(
                    f"train init: {name} is {other.get(name)} in one and {shapes[0].get(name)} in another; "
                    f"allowed: compressors of one model and one shape"
                )
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    students[0].load_state_dict(mean)
    return students[0]


def entries(context: Context, backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the span, ``[layers, G, S, d]``, of layers that see all tokens."""
    span, layers = len(context.span_ids), [context.layers[number] for number in backbone.full_layers]
    return tuple(torch.stack([layer[which][:, :span] for layer in layers]).to(backbone.device) for which in (0, 1))
