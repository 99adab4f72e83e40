"""The two stages: library and selector together, then the selector alone over the frozen library."""

import random

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sglang_metasoft.consolidations.repeats import find_repeats
from sglang_metasoft.train import checkpoint, key_bias
from sglang_metasoft.train.answer_check import answer_logits, cut_slots
from sglang_metasoft.train.attention import Fading
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.curves import Curves
from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.objective import answer_divergence, log_keep, losses, orthogonality
from sglang_metasoft.train.prepare import Context, Store
from sglang_metasoft.train.settings import TrainSettings
from sglang_metasoft.train.student import JudgeQStudent, MetaSoftStudent, Student, mean_of

WARM_UP_STEPS = 20
LAST_RATE = 0.1  # of the learning rate, at the end
PROBE_SHARE = 0.5  # weight of the probe's own divergence, beside that of the refined importance
NOISE, NOISE_UNTIL = 0.3, 0.5  # Gumbel noise on the selection, fading until this share of the steps
SELECTOR_RATE, SCORER_RATE = 0.05, 0.15  # of the learning rate
CALIBRATION_CONTEXTS = 6
GRADIENT_LIMIT = 1.0


class Trainer:
    """One run, resumed where its checkpoint left it.

    Args:
        settings: the run's.
        backbone: frozen model.
        dataset: cases by number.
        store: their prepared form.
        accelerator: of this process; with several, each takes its own contexts and gradients are averaged.
    """

    def __init__(
        self, settings: TrainSettings, backbone: Backbone, dataset: Dataset, store: Store, accelerator: Accelerator
    ) -> None:
        self.settings, self.backbone, self.dataset, self.store = settings, backbone, dataset, store
        self.accelerator = accelerator
        self.student = self._create_student().to(backbone.device)
        self.optimiser = torch.optim.Adam(self._groups())
        self.average = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
        self.step = checkpoint.restore(
            settings.output, self.student, self.average, self.optimiser, settings.fingerprint()
        )
        for group in self.optimiser.param_groups:
            group.setdefault("full", group["lr"])

    @property
    def result(self) -> Student:
        """What the run is for: the mean of the weights over its last steps."""
        return self.average.module

    def _create_student(self) -> Student:
        s = self.settings
        if s.init:
            kind = JudgeQStudent if s.method == "judge_q" else MetaSoftStudent
            return mean_of([kind.load(self.backbone, str(path)) for path in s.init])
        if s.method == "judge_q":
            return JudgeQStudent.create(self.backbone, s.soft_tokens, s.seed)
        student = MetaSoftStudent.create(self.backbone, s.soft_tokens, s.scorer_width, s.selector_features, s.seed)
        student.soft.gate_scale.data.fill_(s.gate)
        return student

    def _groups(self) -> list[dict]:
        rate = self.settings.learning_rate
        groups: dict[float, list] = {}
        for name, parameter in self.student.named_parameters():
            if name == "soft.gate_scale":
                parameter.requires_grad_(False)
                continue
            factor = 1.0
            if name == "soft.library":
                factor = 1 / self.student.soft.norm.item()
            elif ".scorer." in name:
                factor = SCORER_RATE
            elif name.startswith("soft.") and name not in ("soft.bias", "soft.norm"):
                factor = SELECTOR_RATE
            groups.setdefault(rate * factor, []).append(parameter)
        return [{"params": parameters, "lr": lr, "full": lr} for lr, parameters in groups.items()]

    def run(self, curves: Curves, validate) -> dict[str, float]:
        """Train to the end.

        Args:
            curves: takes every step's losses.
            validate: called with the student every ``validate_every`` steps and at the end; its result goes to curves.

        Returns:
            The last validation's scores; empty in processes other than the main one.

        Raises:
            ValueError: the disk is full, or the loss is not finite; the last checkpoint is intact.
        """
        s, main = self.settings, self.accelerator.is_main_process
        scores: dict[str, float] = {}
        if self.step == 0 and isinstance(self.student, MetaSoftStudent) and not s.init:
            contexts = [self._context(n, n % 2 == 1) for n in range(min(CALIBRATION_CONTEXTS, s.cases))]
            self.student.calibrate(self.backbone, contexts, s.seed)
            self.average.module.load_state_dict(self.student.state_dict())
        bar = tqdm(total=s.total_steps, initial=self.step, disable=not main, desc="training", unit="step")
        while self.step < s.total_steps:
            values = self._train_step(self.step)
            self.step += 1
            curves.add(self.step, values)
            bar.update()
            bar.set_postfix(loss=f"{curves.smooth('divergence'):.3f}", lost=f"{curves.smooth('lost'):.3f}")
            at_end = self.step == s.total_steps
            if main and (at_end or self.step % s.checkpoint_every == 0):
                checkpoint.save(s.output, self.student, self.average, self.optimiser, self.step, s.fingerprint())
            if main and (at_end or self.step % s.validate_every == 0):
                scores = validate(self.result)
                curves.add(self.step, scores)
        bar.close()
        if main and not scores:  # a finished run, started again
            scores = validate(self.result)
        return scores

    def _train_step(self, step: int) -> dict[str, float]:
        s = self.settings
        library_frozen = step >= s.steps
        for group in self.optimiser.param_groups:
            group["lr"] = group["full"] * self._rate(step)
        sums: dict[str, float] = {}
        for part in range(s.batch):
            number = (step * s.batch + part) * self.accelerator.num_processes + self.accelerator.process_index
            rng = random.Random(f"{s.seed}:context:{number}")
            at_boundary = number % 2 == 1
            context = self._context(self._case_number(number), at_boundary, rng)
            terms = self._losses(context, rng.choice(s.ratios), self._noise(step, rng), rng)
            total = sum(weight * term for weight, term in terms.values())
            (total / s.batch).backward()
            kind = "boundary" if at_boundary else "inside"
            for name, (_, term) in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() / s.batch
                if name in ("divergence", "lost", "answer divergence"):
                    sums[f"{name} {kind}"] = term.item()
        if isinstance(self.student, MetaSoftStudent):
            library = self.student.soft.library
            penalty = orthogonality(library)
            sums["orthogonality"] = penalty.item()
            if library_frozen:
                library.grad = None
            else:
                (s.orthogonality * penalty).backward()
        if not all(value == value and abs(value) < 1e30 for value in sums.values()):
            raise ValueError(f"training: the loss is not finite at step {step + 1}: {sums}; lower the learning rate")
        trained = [p for p in self.student.parameters() if p.requires_grad and p.grad is not None]
        for parameter in trained:
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        for group in self.optimiser.param_groups:  # tensor scales differ too much for one common norm
            torch.nn.utils.clip_grad_norm_(group["params"], GRADIENT_LIMIT)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if step >= WARM_UP_STEPS:
            self.average.update_parameters(self.student)
        return sums

    def _losses(self, context: Context, ratio: float, noise, rng) -> dict[str, tuple[float, torch.Tensor]]:
        s, target = self.settings, context.target.to(self.backbone.device)
        mass = self.student.probe(self.backbone, context, noise)
        importance = self.student.refine(mass, context, self.backbone)
        refined = losses(importance, target, ratio, s.map_loss)
        ranking, lost, kinds = importance, refined.lost, None
        if s.biases_keys:
            kinds = find_repeats(context.span_ids.to(self.backbone.device))[0]
            ranking = key_bias.favour(importance, kinds)
            lost = key_bias.lost(ranking, target, ratio, kinds)
        terms = {"divergence": (1.0, refined.divergence), "lost": (s.lost_weight, lost)}
        if s.answer_weight:
            number = rng.randrange(len(context.answers))
            with torch.no_grad():
                full = answer_logits(self.backbone, context, number)
            left = log_keep(ranking, cut_slots(context, ratio, s.answer_cut))
            if kinds is not None:
                left = key_bias.carry(left, self.student.carried(mass, importance), kinds)
            faded = answer_logits(self.backbone, context, number, attend=Fading(left))
            terms["answer divergence"] = (s.answer_weight, answer_divergence(full, faded))
        if s.method == "metasoft" and s.scorer_width:
            plain = losses(Student.refine(self.student, mass, context, self.backbone), target, ratio, s.map_loss)
            terms["probe divergence"] = (PROBE_SHARE, plain.divergence)
        return terms

    def _context(self, number: int, at_boundary: bool, rng: random.Random | None = None) -> Context:
        prepared = self.store.get(self.dataset[number])
        if at_boundary:
            return prepared.boundary(self.settings.window)
        choice = rng.randrange(len(prepared.answers)) if rng else 0
        return prepared.inside(choice, self.settings.window)

    def _case_number(self, number: int) -> int:
        epoch, place = divmod(number, self.settings.cases)
        order = list(range(self.settings.cases))
        if epoch:  # the first time through, cases are prepared in their own order
            random.Random(f"{self.settings.seed}:epoch:{epoch}").shuffle(order)
        return order[place]

    def _rate(self, step: int) -> float:
        s = self.settings
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (LAST_RATE + (1 - LAST_RATE) * (1 - step / s.total_steps))

    def _noise(self, step: int, rng: random.Random) -> torch.Tensor | None:
        fade = 1 - step / (NOISE_UNTIL * self.settings.total_steps)
        if not isinstance(self.student, MetaSoftStudent) or fade <= 0:
            return None
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        uniform = torch.rand(self.student.soft.bias.shape[1:], generator=generator).clamp(1e-6, 1 - 1e-6)
        return (NOISE * fade * -(-uniform.log()).log()).to(self.backbone.device)
