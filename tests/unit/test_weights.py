"""Weight updates: every kind forgets, and a method follows the new weights or says that it cannot."""

import ast
import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.adapter import load_adapter
from metasoft_patches.forward.runner import ProbeRunner
from metasoft_patches.hooks.contract import find, split
from metasoft_patches.hooks.install import register_hooks, verify_hooks
from metasoft_patches.scheduler.compressor import SchedulerCompressor
from metasoft_patches.scheduler.hooks import SchedulerHooks
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.methods import load_method
from tests.unit.methods import CPU, SHAPE, TinyModel, make_prompt

UPDATES = [target for target in load_adapter().targets if target.hook == "weights_changed"]


def test_every_kind_of_update_that_sglang_has_is_hooked():
    """Whatever its manager of updates calls so; beginning one changes nothing yet."""
    manager, _ = split(UPDATES[0].path)
    methods = find(manager, "SchedulerWeightUpdaterManager").body
    names = {node.name for node in methods if isinstance(node, ast.FunctionDef)}
    kinds = {name for name in names if name.startswith("update_weights") or name == "end_weight_update"}
    assert len(kinds) >= 4 and {target.path.rsplit(".", 1)[1] for target in UPDATES} == kinds


class Manager:
    """As much of SGLang's manager as its methods need to update the weights of nothing, or to fail."""

    tp_cpu_group = None

    def __init__(self, succeeds: bool):
        outcome = succeeds, "said so"
        self._session = SimpleNamespace(selector="all", loaded_weights=True)
        self.updater = SimpleNamespace(
            receive_weights_from_distributed=lambda **kwargs: [],
            load_weights_from_distributed=lambda weights: outcome,
            end_weight_update=lambda **kwargs: None,
        )
        for name in ("disk", "tensor", "ipc", "distributed"):
            setattr(self.updater, f"update_weights_from_{name}", lambda *args, **kwargs: outcome)
            setattr(self, f"update_weights_from_{name}", lambda *args, **kwargs: outcome)  # 0.5.17's worker
        self.model_runner = SimpleNamespace(weight_updater=self.updater)
        self.tp_worker = self.draft_worker = self

    def deserialize_own_rank(self, tensors):
        return []

    def weight_update_runners(self):
        return [("target", self.model_runner)]

    def _select_runners(self, selector="all"):
        return self.weight_update_runners()

    @contextlib.contextmanager
    def _observe_weight_load(self, source):
        yield

    def flush_cache_after_weight_update(self, recv_req, success=True, message=""):
        return success, message

    def record_weight_version_after_update(self, version):
        pass


@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("target", UPDATES, ids=lambda target: target.path.rsplit(".", 1)[1])
def test_each_kind_forgets_whether_it_succeeds_or_not(target, succeeds, monkeypatch):
    """SGLang's own method, hooked as in a server."""
    import sglang.srt.managers.scheduler_components.weight_updater as module

    name = target.path.rsplit(".", 1)[1]
    owner = module.SchedulerWeightUpdaterManager
    monkeypatch.setattr(owner, name, vars(owner)[name])  # put back afterwards
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target.path})
    monkeypatch.setitem(HookRegistry._hooks, target.path, [])
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    structs = SimpleNamespace(replace=lambda session, **changes: session)
    monkeypatch.setattr(module, "msgspec", SimpleNamespace(structs=structs), raising=False)
    hooks = SchedulerHooks(MetaSoftConfig(), load_adapter())
    compressor = hooks.compressor = SchedulerCompressor.__new__(SchedulerCompressor)
    compressor.namespaces, forgotten = SimpleNamespace(generation=5), []
    tree = SimpleNamespace(prefixes=SimpleNamespace(clear=lambda: forgotten.append("prefixes")))
    compressor.committer, compressor.stages = SimpleNamespace(tree_cache=tree), SimpleNamespace(is_stale=False)
    register_hooks([target], hooks)
    HookRegistry.apply_hooks()
    verify_hooks([target])
    manager = Manager(succeeds)
    request = SimpleNamespace(**dict.fromkeys(
        ("model_path", "load_format", "recapture_cuda_graph", "weight_version", "flush_cache", "names", "dtypes",
         "shapes", "group_name", "serialized_named_tensors", "torch_empty_cache", "disable_draft_model"), None,
    ), selector="all")  # fmt: skip
    getattr(owner, name)(manager, request)
    assert forgotten == ["prefixes"] and compressor.namespaces.generation == 6 and compressor.stages.is_stale


# -- methods -------------------------------------------------------------------------------------------------------


class Served:
    """A model whose embeddings may change."""

    def __init__(self, tmp_path):
        self.table = torch.randn(SHAPE.vocab_size, SHAPE.hidden_size, generator=torch.Generator().manual_seed(3))
        SoftTokens.untrained(SHAPE, 8, self.embed, CPU).save(tmp_path / "soft", SHAPE)
        StaticTokens(torch.randn(8, SHAPE.hidden_size)).save(tmp_path / "static", SHAPE, self.embed)
        self.folders = {"metasoft": str(tmp_path / "soft"), "judge_q": str(tmp_path / "static")}

    def embed(self, ids):
        return self.table[ids]

    def method(self, name: str, trained: bool, **settings):
        config = MetaSoftConfig(method=name, path=self.folders[name] if trained else None, **settings)
        method = load_method(name)(config, SHAPE, self.embed, CPU)
        method.prepare(TinyModel(CPU))
        return method


@pytest.mark.parametrize("name", ["metasoft", "judge_q"])
def test_a_trained_method_follows_weights_that_fit_and_refuses_others(name, tmp_path, monkeypatch):
    served = Served(tmp_path)
    method = served.method(name, trained=True, consolidation="key_bias")
    directions, identity, table = method.consolidation.directions, method.identity, served.table
    monkeypatch.setattr(
        "sglang_metasoft.compressor.soft_tokens.resolve_folder", None
    )  # the file, or the hub, is asked once
    served.table = table + 0.01 * table.std() * torch.randn_like(table)
    assert method.follow_weights(TinyModel(CPU)) is method and method.identity == identity
    assert method.consolidation.directions is not directions, "the queries are others too"
    served.table = torch.randn_like(table)
    with pytest.raises(ValueError, match="whose embedding table is not that of the served model"):
        method.follow_weights(TinyModel(CPU))
    served.table = table
    assert method.follow_weights(TinyModel(CPU)) is method


def test_untrained_soft_tokens_are_made_anew(tmp_path):
    served = Served(tmp_path)
    method = served.method("metasoft", trained=False)
    before = method.probe(make_prompt()).embeds
    same = method.follow_weights(TinyModel(CPU))
    assert same.identity == method.identity and torch.equal(same.probe(make_prompt()).embeds, before)
    served.table = torch.randn_like(served.table)
    other = method.follow_weights(TinyModel(CPU))
    assert other.identity != method.identity


def test_the_stages_note_weights_that_do_not_fit_and_recover(tmp_path, caplog):
    served = Served(tmp_path)
    runner = ProbeRunner.__new__(ProbeRunner)
    runner.config, runner.scheduler, runner.adapter, runner.runner = MetaSoftConfig(), None, None, None
    runner.model = None
    runner.method, runner.unfit, runner.is_stale = served.method("metasoft", trained=True), None, True
    table = served.table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metasoft_patches.forward.runner.SGLangModel", lambda *args: TinyModel(CPU))
        patch.setattr(ProbeRunner, "_embed", None)
        for fits in (True, False, False, True):
            served.table = table if fits else torch.randn_like(table)
            runner.is_stale = True
            runner.follow_weights()
            assert (runner.unfit is None) == fits and not runner.is_stale
    assert sum("no prompt is compressed" in record.message for record in caplog.records) == 2
    assert sum("fit again" in record.message for record in caplog.records) == 1
