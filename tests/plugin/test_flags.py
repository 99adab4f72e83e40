"""Flags, keywords and start-up checks, through SGLang's own parser and record, before any model loads."""

import copy
import dataclasses
import json
import multiprocessing
import pickle
import re
from importlib.metadata import version

import pytest
import sglang.srt.plugins as plugins
from metasoft_patches import compat, frontend
from metasoft_patches.adapter import load_adapter
from metasoft_patches.hooks import contract

from sglang_metasoft.config import settings_of

plugins.load_plugins()

from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import ServerArgs, prepare_server_args  # noqa: E402

CARRIER = "_metasoft"


@pytest.fixture
def parse(model_dir):
    return lambda *flags: prepare_server_args(["--model-path", str(model_dir), *flags])


def test_help_lists_every_flag_in_its_own_group(capsys):
    with pytest.raises(SystemExit):
        prepare_server_args(["--help"])
    text = capsys.readouterr().out
    group = text[text.index("MetaSoft:") :]
    assert "--enable-metasoft" in group and "--metasoft-config" in group
    for field in settings_of().values():
        if field.metadata["flag"]:
            assert field.metadata["flag"] in group


def test_without_the_flag_nothing_is_configured(parse):
    args = parse()
    assert getattr(args, CARRIER) is None and args.radix_cache_backend is None


def test_flags_and_json_make_the_configuration(parse):
    args = parse(
        "--enable-metasoft", "--metasoft-ratio", "8", "--metasoft-window", "32", "--no-metasoft-keep-raw",
        "--metasoft-config", json.dumps({"route_targets": 2}),
    )  # fmt: skip
    config = getattr(args, CARRIER)
    assert (config.ratio, config.window, config.keep_raw, config.route_targets) == (8.0, 32, False, 2)
    assert args.radix_cache_backend == "metasoft"


def test_the_configuration_reaches_other_processes(parse):
    args = parse("--enable-metasoft", "--metasoft-budget", "300")
    config, sent = getattr(args, CARRIER), getattr(pickle.loads(pickle.dumps(args)), CARRIER)
    assert sent == dataclasses.replace(config, secret="") and sent.budget == 300
    assert config.secret.encode() not in pickle.dumps(args)  # which SGLang writes into its crash dumps
    assert getattr(copy.deepcopy(args), CARRIER) is config is copy.copy(config)


def tell_secret(args, pipe):
    pipe.send(getattr(args, CARRIER).secret)


def test_a_process_that_is_started_gets_the_secret(parse):
    args = parse("--enable-metasoft")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=tell_secret, args=(args, theirs))
    process.start()
    assert ours.poll(120) and ours.recv() == getattr(args, CARRIER).secret != ""
    process.join()


def test_who_starts_schedulers_from_a_pickled_record_draws_a_secret(parse):
    args = pickle.loads(pickle.dumps(resolve(parse("--enable-metasoft"))))
    args.check_server_args()
    assert len(getattr(args, CARRIER).secret) == 32


def test_a_scheduler_without_the_secret_does_not_start(parse):
    with pytest.raises(RuntimeError, match="secret did not come"):
        frontend.configure_scheduler(None, pickle.loads(pickle.dumps(parse("--enable-metasoft"))))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metasoft-ratio", "0.5"], "0.5 is not allowed; allowed: a number >= 1"),
        (["--metasoft-ratio", "four"], "'four' is not allowed; allowed: a number >= 1"),
        (["--metasoft-budget", "0"], "0 is not allowed; allowed: an integer >= 1"),
        (["--metasoft-budget", "2.5"], "'2.5' is not allowed"),
        (["--metasoft-min-tokens", "0"], "0 is not allowed"),
        (["--metasoft-window", "-3"], "-3 is not allowed"),
        (["--metasoft-sink", "-1"], "-1 is not allowed"),
        (["--metasoft-method", "magic"], "'magic' is not allowed; allowed: one of: auto, metasoft, judge_q, snapkv, "),
        (["--metasoft-config", "{"], "not JSON"),
        (["--metasoft-config", '{"ration": 1}'], "unknown key 'ration'"),
    ],
)
def test_a_bad_flag_is_named_with_the_allowed_values(parse, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        parse("--enable-metasoft", *flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_settings_without_the_switch_are_refused(parse):
    with pytest.raises(ValueError, match="ratio given without --enable-metasoft"):
        parse("--metasoft-ratio", "4")


def test_a_setting_given_twice_is_refused(parse):
    with pytest.raises(ValueError, match="ratio given both as a flag and in --metasoft-config"):
        parse("--enable-metasoft", "--metasoft-ratio", "4", "--metasoft-config", '{"ratio": 8}')


def test_engine_keywords_make_the_configuration(model_dir):
    args = Engine.server_args_class(
        model_path=str(model_dir), enable_metasoft=True, metasoft_ratio=8, metasoft_config={"window": 16}
    )
    config = getattr(args, CARRIER)
    assert isinstance(args, ServerArgs) and (config.ratio, config.window) == (8, 16)
    assert getattr(Engine.server_args_class(model_path=str(model_dir)), CARRIER) is None


def test_an_unknown_engine_keyword_lists_the_known_ones(model_dir):
    with pytest.raises(ValueError, match="unknown keyword 'metasoft_ration'; allowed: .*metasoft_ratio"):
        Engine.server_args_class(model_path=str(model_dir), enable_metasoft=True, metasoft_ration=8)


def resolve(args):
    """Settle what the flags left open; 0.5.17 does that when the record is made."""
    getattr(args, "resolve_once", lambda: None)()
    return args


def check(args) -> None:
    resolve(args).check_server_args()


def test_a_plain_server_with_the_flag_passes_the_checks(parse):
    check(parse("--enable-metasoft"))


@pytest.mark.parametrize(
    ("flags", "feature"),
    [
        (["--disable-radix-cache"], "no radix cache"),
        (["--radix-eviction-policy", "lfu"], "another eviction policy"),
        (["--pp-size", "2"], "pipeline parallelism"),
        (["--enable-streaming-session"], "sessions"),
        (["--is-embedding"], "embedding models"),
        (["--strip-thinking-cache"], "strip-thinking cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feature_that_cannot_work_together_is_refused(parse, flags, feature):
    with pytest.raises(ValueError, match=f"--enable-metasoft cannot run with {feature}") as error:
        check(parse("--enable-metasoft", *flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metasoft-method", "judge_q"], "judge_q has nothing untrained to fall back on; give --metasoft-path"),
        (["--metasoft-method", "h2o", "--metasoft-path", "there"], "'there' is given, but method h2o is not trained"),
        (
            ["--metasoft-method", "kvcompose", "--tp-size", "3"],
            "kvcompose compares heads .* allowed: --tp-size 1, not 3",
        ),
    ],
)
def test_a_method_refuses_settings_that_it_cannot_have(parse, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        check(parse("--enable-metasoft", *flags))
    assert "\n" not in str(error.value)


class PlainArgs:
    """Resolved arguments of a server with nothing special, and a model of the supported kind."""

    def __init__(self, parse):
        self.args, self.model = load_adapter().settings(resolve(parse("--enable-metasoft")))


class Changed:
    """An object that answers for another, but for the given attributes."""

    def __init__(self, other, **changes):
        self._other = other
        self.__dict__.update(changes)

    def __getattr__(self, name):
        return getattr(self._other, name)


REFUSED_VALUES = {
    "speculative_algorithm": "EAGLE", "disaggregation_mode": "prefill", "enable_dp_attention": True,
    "dcp_size": 2, "attn_cp_size": 2, "enable_kv_cache_sharding": True, "enable_two_batch_overlap": True,
    "enable_pdmux": True, "hicache_storage_backend": "file", "enable_lmcache": True, "enable_flexkv": True,
    "enable_unified_cache_external_linker": True, "enable_hisparse": True, "radix_cache_backend": "flexkv",
    "enable_session_radix_cache": True, "kv_canary": "log", "dllm_algorithm": "x", "enable_mis": True,
    "enable_unified_memory": True, "smg_grpc_mode": True, "grpc_mode": True, "use_ray": True,
    "kv_cache_dtype": "fp4_e2m1", "kv_events_config": '{"publisher": "zmq"}', "device": "xpu",
}  # fmt: skip


def test_every_refusal_looks_at_fields_that_exist(parse):
    plain = PlainArgs(parse)
    compat.check_features(plain.args, plain.model)
    for name, value in REFUSED_VALUES.items():
        getattr(plain.args, name)  # a renamed field must fail here, not pass unnoticed
        with pytest.raises(ValueError, match="--enable-metasoft cannot run with"):
            compat.check_features(Changed(plain.args, **{name: value}), plain.model)
    for name, value in {
        "is_hybrid_swa": True, "is_encoder_decoder": True, "is_generation": False,
    }.items():  # fmt: skip
        getattr(plain.model, name)
        with pytest.raises(ValueError, match="--enable-metasoft cannot run with"):
            compat.check_features(plain.args, Changed(plain.model, **{name: value}))


def test_a_window_that_a_configuration_names_and_no_layer_has_is_no_reason_to_refuse(parse):
    """Some classes of SGLang read past it; what the loaded layers have is checked."""
    plain = PlainArgs(parse)
    compat.check_features(plain.args, Changed(plain.model, sliding_window_size=4096))


def test_hicache_is_served_and_refused_where_a_request_cannot_stay_in_the_queue(parse, monkeypatch):
    plain = PlainArgs(parse)
    args = Changed(plain.args, enable_hierarchical_cache=True)
    monkeypatch.setattr(compat, "version", lambda name: "0.5.23")
    compat.check_features(args, plain.model)
    monkeypatch.setattr(compat, "version", lambda name: "0.5.17.post1")
    with pytest.raises(ValueError, match="HiCache on SGLang 0.5.17 \\(--enable-hierarchical-cache\\): a request whose"):
        compat.check_features(args, plain.model)


def test_the_rust_server_is_refused(parse, monkeypatch):
    plain = PlainArgs(parse)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(ValueError, match="the Rust server"):
        compat.check_features(plain.args, plain.model)


def test_another_sglang_version_is_refused_by_name(parse, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.6.0")
    with pytest.raises(ValueError, match="SGLang 0.6.0 is not supported; supported: 0.5.23, 0.5.17"):
        parse("--enable-metasoft")


@pytest.fixture
def warnings(monkeypatch):
    """What the parser and the checks warn of (SGLang takes the root logger's handlers away)."""
    lines = []
    for logger in (contract.logger, frontend.logger):
        monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def build(monkeypatch):
    """Pretend that a build of the installed version is there."""
    contract.check_build.cache_clear()
    monkeypatch.setattr(compat, "version", lambda name: f"{version(name)}.post1")
    yield
    contract.check_build.cache_clear()


def test_a_build_of_a_supported_sglang_starts_if_its_source_fits(parse, build, warnings, monkeypatch):
    assert getattr(parse("--enable-metasoft"), CARRIER) is not None
    words = f"SGLang {version('sglang')}.post1 is a build of {version('sglang')}, which is the tested one"
    assert len(warnings) == 1 and words in warnings[0]
    contract.check_build.cache_clear()
    real = contract.find
    moved = ("Scheduler.run_batch", "DecodeCudaGraphRunner._copy_replay_inputs")
    monkeypatch.setattr(contract, "find", lambda module, name: real(module, name + "x" * (name in moved)))
    words = "post1 does not fit, though it is a build of .*run_batchx.*_copy_replay_inputsx"
    with pytest.raises(ValueError, match=words):
        parse("--enable-metasoft")
    assert getattr(parse(), CARRIER) is None


@pytest.mark.parametrize("other", ["0.5.24", "0.5.23rc1", "0.5.23.dev3", "0.5.22.post1", "0.5.230", "0.5.23-post1"])
def test_what_is_no_build_of_a_supported_sglang_is_refused(parse, monkeypatch, other):
    monkeypatch.setattr(compat, "version", lambda name: other)
    with pytest.raises(ValueError, match=f"SGLang {re.escape(other)} is not supported; supported: 0.5.23, 0.5.17"):
        parse("--enable-metasoft")


@pytest.mark.parametrize(
    ("name", "hip", "system"), [("ROCm", "7.0", "Linux"), ("macOS", None, "Darwin"), ("FreeBSD", None, "FreeBSD")]
)
def test_a_server_on_rocm_or_macos_says_at_start_up_that_it_is_untested(
    parse, monkeypatch, warnings, name, hip, system
):
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("platform.system", lambda: system)
    check(parse("--enable-metasoft"))
    assert len(warnings) == 1 and f"nothing of it has been tested on {name};" in warnings[0]


@pytest.mark.parametrize("device", ["mps", "xpu", "npu:0"])
def test_a_macs_gpu_and_other_accelerators_are_refused_at_start_up(parse, device):
    plain = PlainArgs(parse)
    with pytest.raises(ValueError, match="accelerators other than GPUs .--device.: .*; allowed: cuda, cpu"):
        compat.check_features(Changed(plain.args, device=device), plain.model)


def test_a_hook_that_did_not_take_stops_the_start(parse, monkeypatch):
    path = "sglang.srt.sampling.sampling_params.SamplingParams.verify"
    assert path in HookRegistry._patched
    monkeypatch.setattr(SamplingParams, "verify", SamplingParams.verify.__wrapped__)
    with pytest.raises(RuntimeError, match=f"these hooks did not take on SGLang .*: {path}"):
        check(parse("--enable-metasoft"))
