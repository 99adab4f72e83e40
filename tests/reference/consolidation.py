"""What one head's dropped entries leave to its kept ones; for the reference, in plain loops and dense matrices."""

import torch

NEAR_TIE = 5e-4
E4 = 2.718281828459045**4


def without_repeats(ids: list[int], rank: torch.Tensor) -> torch.Tensor:
    """[S] importance of one head: of entries with the same last three tokens one counts for most of all."""
    groups, rank = {}, rank.tolist()
    result = list(rank)
    for i in range(len(rank)):
        groups.setdefault(tuple(ids[i - 2 : i + 1]) or i, []).append(i)
    for members in groups.values():
        best = sorted(members, key=lambda i: (-rank[i], i))
        for place, i in enumerate(best):
            result[i] = rank[i] / (place + 1) if place else (rank[i] * sum(rank[j] for j in members)) ** 0.5
    return torch.tensor(result)


def carried_bias(ids: list[int], mass: torch.Tensor, kept: list[int], sink: int) -> torch.Tensor:
    """[B] what one head's kept entries carry: mass of the same three tokens, of the same token, half the rest."""
    stay, mass = kept[sink:], mass.tolist()
    by_three, by_token = {}, {}
    for i in stay:
        by_three.setdefault(tuple(ids[i - 2 : i + 1]) or i, []).append(i)
        by_token.setdefault(ids[i], []).append(i)
    carried, rest = {i: mass[i] for i in stay}, 0.0
    for i in sorted(set(range(sink, len(mass))) - set(stay)):
        heirs = by_three.get(tuple(ids[i - 2 : i + 1]) or i) or by_token.get(ids[i], [])
        total = sum(mass[j] for j in heirs)
        for j in heirs:
            carried[j] += mass[i] * mass[j] / total
        rest += 0.0 if heirs else mass[i]
    more = 1 + 0.5 * rest / sum(carried.values())
    shares = [1.0] * sink + [carried[i] * more / mass[i] for i in stay]
    return torch.tensor(shares).clamp(min=1, max=E4).log()


def flow(
    gate_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    kept: list[int],
    targets: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, d] one head's kept values with what flowed into them, and [B] which of them a near tie decided."""
    dropped = sorted(set(range(len(k))) - set(kept))
    nearest, order = (k[dropped] @ k[kept].T * scale).topk(targets + 1, dim=1)
    contested = torch.zeros(len(kept), dtype=torch.bool)
    contested[order[nearest[:, -2] - nearest[:, -1] < NEAR_TIE, -2:].flatten()] = True
    routing = torch.zeros(len(dropped), len(kept))
    routing.scatter_(1, order[:, :targets], torch.softmax(nearest[:, :targets], dim=1))
    flow = (routing / (routing.sum(dim=0) + 1e-6)).T @ v[dropped]
    moved = routing.T @ a[dropped]
    gate = gate_scale * moved / (a[kept] + moved)
    return v[kept] + gate[:, None] * (flow - v[kept]), contested
