"""Several ranks serve one compressor: the first rank's choice, by its contents, where it lies on each machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from metasoft_patches.scheduler import ranks

from sglang_metasoft.compressor.find import Compressor, fingerprint
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.types import ModelShape

SHAPE = ModelShape("tiny", vocab_size=64, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)


def compressor(folder: Path, seed: int) -> Compressor:
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    folder.mkdir(parents=True)
    SoftTokens.untrained(SHAPE, 2, lambda ids: table[ids], torch.device("cpu")).save(folder, SHAPE)
    return Compressor(str(folder), "fitted", "metasoft", 2, None)


def choices(monkeypatch, *found: list[Compressor]) -> list[Compressor | None | str]:
    """What each rank gets, given what each has found; an error's words."""
    gathered = [([fingerprint(one) for one in own], [one.path for one in own]) for own in found]

    def gather(own):
        assert own in gathered
        return gathered

    world = SimpleNamespace(world_size=len(found), all_gather_object=gather)
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(world_group=world))

    def choice(own):
        try:
            return ranks.first_ranks_choice(own)
        except ValueError as error:
            return str(error)

    return [choice(own) for own in found]


@pytest.fixture
def machines(tmp_path):
    """Two machines with the compressors a and b, in folders of their own."""
    return [[compressor(tmp_path / machine / name, seed) for seed, name in enumerate("ab")] for machine in ("0", "1")]


def test_all_take_what_the_first_rank_finds_best(machines, monkeypatch):
    (a0, b0), (a1, b1) = machines
    assert choices(monkeypatch, [b0, a0], [a1, b1]) == [b0, b1]
    assert choices(monkeypatch, [a0], [b1, a1], [a1]) == [a0, a1, a1]


def test_one_process_takes_its_best(machines, monkeypatch):
    assert choices(monkeypatch, machines[0]) == [machines[0][0]] and choices(monkeypatch, []) == [None]


def test_where_the_first_rank_finds_none_none_is_served(machines, monkeypatch):
    assert choices(monkeypatch, [], machines[1]) == [None, None]


def test_a_rank_that_lacks_it_ends_the_start_on_all(machines, monkeypatch):
    (a0, b0), (a1, b1) = machines
    words = choices(monkeypatch, [a0], [b1], [a1], [])
    assert len(set(words)) == 1 and f"rank 1, 3 lacks the compressor {a0.path!r} that rank 0 serves" in words[0]
