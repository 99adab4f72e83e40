"""Losses and scores of a run: JSON lines, TensorBoard, and a picture."""

import json
from pathlib import Path

SMOOTHING = 0.95


class Curves:
    """Appends to ``curves.jsonl`` in the run's folder; the rest is drawn from it.

    Args:
        folder: of the run.
        steps_done: later lines are of a run that was interrupted after its checkpoint; they are dropped.
        active: False in all processes but one.
    """

    def __init__(self, folder: Path, steps_done: int, active: bool = True) -> None:
        self.folder, self.active = folder, active
        self.file = folder / "curves.jsonl"
        self.rows: list[dict] = []
        self._smooth: dict[str, float] = {}
        self._board = None
        if not active:
            return
        if self.file.is_file():
            lines = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]
            self.rows = [row for row in lines if row["step"] <= steps_done]
        folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Take one step's values."""
        for name, value in values.items():
            self._smooth[name] = SMOOTHING * self._smooth.get(name, value) + (1 - SMOOTHING) * value
            if self._board is not None:
                self._board.add_scalar(name.replace(" ", "_"), value, step)
        row = {"step": step, **values}
        self.rows.append(row)
        if self.active:
            with self.file.open("a") as handle:
                handle.write(json.dumps(row) + "\n")

    def smooth(self, name: str) -> float:
        """Running average."""
        return self._smooth.get(name, float("nan"))

    def draw(self, file: Path) -> None:
        """Write a PNG: losses, orthogonality, and overlap with the oracle."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        panels = (
            ("loss", ("divergence", "lost", "answer divergence")),
            ("‖LLᵀ − I‖²", ("orthogonality",)),
            ("overlap", ("overlap",)),
        )
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
        for axis, (title, starts) in zip(axes, panels, strict=True):
            names = sorted({name for row in self.rows for name in row if name.startswith(starts)})
            for name in names:
                points = [(row["step"], row[name]) for row in self.rows if name in row]
                if title != "overlap":
                    points = _running(points)
                axis.plot(*zip(*points, strict=True), label=name, marker="o" if title == "overlap" else None, ms=3)
            axis.set(title=title, xlabel="step")
            if names:
                axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(file, dpi=110)
        pyplot.close(figure)


def _running(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    mean, out = points[0][1], []
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        out.append((step, mean))
    return out
