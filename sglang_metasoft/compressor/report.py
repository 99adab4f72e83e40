"""What a compressor's ``config.json`` says of its own quality: measured when it was fitted, and optional."""

from typing import Any, NamedTuple


class Report(NamedTuple):
    """What was kept of the full cache's answers."""

    kept: dict[float, dict[str, float]]  # ratio -> where the question stood (inside, after) -> share
    limit_ratio: float | None  # the highest ratio that it vouches for

    @property
    def summary(self) -> str:
        """A clause for a line that names the compressor."""
        cells = [
            f"{', '.join(f'{share:.0%} {where}' for where, share in places.items())} at {ratio:g}x"
            for ratio, places in sorted(self.kept.items())
        ]
        limit = [] if self.limit_ratio is None else [f"limit ratio {self.limit_ratio:g}"]
        return "; ".join(([f"kept when fitted: {'; '.join(cells)}"] if cells else []) + limit)


def read_report(config: dict) -> Report | None:
    """The ``report`` of a configuration, ``{"kept": {"4": {"inside": 0.93}}, "limit_ratio": 6.0}``.

    What is not of that form is left out. None: nothing remains.
    """
    found = config.get("report")
    if not isinstance(found, dict):
        return None
    kept = {}
    for text, places in _items(found.get("kept")):
        ratio = _ratio(text)
        shares = {where: share for where, share in _items(places) if _is_number(share) and share >= 0}
        if ratio is not None and shares:
            kept[ratio] = shares
    given: Any = found.get("limit_ratio")
    limit = float(given) if _is_number(given) and given >= 1 else None
    return Report(kept, limit) if kept or limit is not None else None


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _ratio(text: str) -> float | None:
    try:
        ratio = float(text)
    except ValueError:
        return None
    return ratio if 1 <= ratio < float("inf") else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
