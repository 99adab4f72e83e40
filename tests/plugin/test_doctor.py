"""``sglang-metasoft doctor``: each problem is found and has a remedy; exit codes and JSON are for scripts."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch
from metasoft_patches.compat import SUPPORTED_SGLANG
from metasoft_patches.doctor import machine_checks
from metasoft_patches.doctor.command import main
from metasoft_patches.hooks import contract

from sglang_metasoft import cli

FIELDS = {"name", "status", "found", "remedy"}


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


def report(capsys, *argv):
    """Exit code, checks by name, estimate."""
    code = main([*argv, "--json"])
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {"schema", "ok", "checks", "estimate"} and written["schema"] == 1
    assert all(set(check) == FIELDS for check in written["checks"])
    assert all(check["remedy"] for check in written["checks"] if check["status"] == "problem")
    assert written["ok"] == (code == 0) == all(check["status"] != "problem" for check in written["checks"])
    return code, {check["name"]: check for check in written["checks"]}, written["estimate"]


def pretend(monkeypatch, name, version):
    real = importlib.metadata.version

    def found(asked):
        if asked != name:
            return real(asked)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def test_this_machine_is_sound(capsys):
    code, checks, estimate = report(capsys)
    assert code == 0 and estimate is None
    names = ["python", "sglang", "plugin", "hooks", "accelerator", "triton", "flashinfer-python"]
    assert list(checks) == names
    assert checks["sglang"]["found"] in SUPPORTED_SGLANG


@pytest.mark.parametrize("version", [None, "0.4.0", "0.5.22", "0.6.0"])
def test_another_sglang_is_a_problem(capsys, monkeypatch, version):
    pretend(monkeypatch, "sglang", version)
    code, checks, _ = report(capsys)
    assert code == 1 and checks["sglang"]["status"] == "problem" and checks["hooks"]["status"] == "skipped"
    assert checks["sglang"]["remedy"] == f"pip install sglang=={SUPPORTED_SGLANG[0]}"
    assert (version or "not installed") in checks["sglang"]["found"]


@pytest.mark.parametrize("ending", [".post1", "+cu130", ".post2+cu130"])
def test_a_build_of_a_supported_sglang_is_sound(capsys, monkeypatch, ending):
    tested = importlib.metadata.version("sglang")
    pretend(monkeypatch, "sglang", tested + ending)
    _, checks, _ = report(capsys)
    assert checks["sglang"]["status"] == checks["hooks"]["status"] == "ok"
    assert checks["sglang"]["found"] == f"{tested}{ending}, a build of {tested}"


def test_a_hook_whose_target_moved_is_named(capsys, monkeypatch):
    real = contract.find

    def find(module, qualified):
        if qualified == "Scheduler.run_batch":
            return real(module, "Scheduler.__init__")
        if qualified == "SamplingParams.verify":
            return real(module, "SamplingParams.no_such_thing")
        return real(module, qualified)

    monkeypatch.setattr(contract, "find", find)
    code, checks, _ = report(capsys)
    assert code == 1
    assert "sglang.srt.managers.scheduler.Scheduler.run_batch takes" in checks["hooks"]["found"]
    assert "no sglang.srt.sampling.sampling_params.SamplingParams.no_such_thing" in checks["hooks"]["found"]


def test_a_plugin_that_sglang_is_told_to_leave_out(capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other, metasoft_cpu")
    code, checks, _ = report(capsys)
    assert code == 1 and "leaves out metasoft" in checks["plugin"]["found"]
    monkeypatch.setenv("SGLANG_PLUGINS", "metasoft,metasoft_cpu")
    assert report(capsys)[1]["plugin"]["status"] == "ok"


def test_a_gpu_without_its_libraries(capsys, monkeypatch):
    pretend(monkeypatch, "flashinfer-python", None)
    assert machine_checks.library("flashinfer-python").status == "skipped"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert machine_checks.library("flashinfer-python").status == "problem"
    assert machine_checks.library("triton").status == "ok"


def test_rocm_is_a_problem(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "AMD Instinct MI300X")
    monkeypatch.setattr("torch.version.hip", "7.0")
    check = machine_checks.accelerator()
    assert check.status == "problem" and check.found == "AMD Instinct MI300X: nothing has been tested on ROCm"


def test_sglangs_own_cpu_engine_is_a_problem(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert machine_checks.accelerator().status == "ok"
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert machine_checks.accelerator().remedy.startswith("unset SGLANG_USE_CPU_ENGINE")


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9, 1), "problem"), ((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((3, 14, 0), "problem")],
)
def test_python_versions(monkeypatch, version, status):
    monkeypatch.setattr(sys, "version_info", version)
    assert machine_checks.python().status == status


def test_a_model_and_its_compressor(capsys, model_dir, compressor_dir):
    code, checks, estimate = report(
        capsys, "--model-path", str(model_dir), "--metasoft-path", str(compressor_dir),
        "--prompt-tokens", "2048", "--output-tokens", "16", "--pool-tokens", "8288", "--chunk-tokens", "512",
    )  # fmt: skip
    assert code == 0 and checks["compressor"]["found"].endswith(" for metasoft, 16 soft tokens")
    assert checks["features"]["status"] == "ok"
    assert estimate["requests_raw"] == 4 and estimate["kv_bytes_per_token"] == 30 * 3 * 64 * 2 * 2
    assert estimate["workspace_bytes"] == 64 * 2**20 + 128 * 2048
    assert [fit["ratio"] for fit in estimate["fits"]] == [2, 4, 8]
    assert [fit["prompt_entries"] for fit in estimate["fits"]] == [1024, 512, 256]
    assert set(estimate["fits"][0]) == {"ratio", "prompt_entries", "requests", "requests_during_prefill", "bypass"}


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_broken_compressor_is_named(capsys, model_dir, compressor_dir, tmp_path, damage):
    for file in compressor_dir.iterdir():
        (tmp_path / file.name).write_bytes(b"{" if file.name == damage else file.read_bytes())
    code, checks, _ = report(capsys, "--model-path", str(model_dir), "--metasoft-path", str(tmp_path))
    assert code == 1 and damage in checks["compressor"]["found"]


def test_refused_features_are_all_listed(capsys, model_dir):
    flags = ["--", "--disable-radix-cache", "--radix-eviction-policy", "lfu", "--enable-lmcache"]
    assert main(["--model-path", str(model_dir), *flags]) == 1
    text = capsys.readouterr().out
    for words in ("without --disable-radix-cache", "without --radix-eviction-policy", "without --enable-lmcache"):
        assert words in text
    assert "3 problems found" in text


def test_server_flags_reach_the_estimate(capsys, model_dir):
    argv = ["--model-path", str(model_dir), "--prompt-tokens", "4096", "--memory-gib", "1"]
    plain = report(capsys, *argv)[2]
    other = main([*argv, "--json", "--", "--kv-cache-dtype", "fp8_e5m2", "--metasoft-window", "256"])
    other = json.loads(capsys.readouterr().out)["estimate"]
    assert plain["pool_tokens"] == 2**30 // plain["kv_bytes_per_token"]
    assert other["kv_bytes_per_token"] * 2 == plain["kv_bytes_per_token"]
    assert other["requests_raw"] >= 2 * plain["requests_raw"]


@pytest.mark.skipif(importlib.metadata.version("sglang") == "0.5.17", reason="HiCache is refused there")
def test_what_a_host_pool_holds(capsys, model_dir):
    argv = ["--model-path", str(model_dir), "--prompt-tokens", "2048", "--output-tokens", "16", "--pool-tokens", "8000"]
    for flags, tokens in (("--hicache-ratio 3", 24_000), ("--hicache-size 1", 10**9 // (30 * 3 * 64 * 2 * 2))):
        assert main([*argv, "--", "--enable-hierarchical-cache", *flags.split()]) == 0
        words = capsys.readouterr().out
        assert (
            f"a host pool of {tokens:,} tokens (if the host has that memory) holds {tokens // 2064} of them raw, "
            in words
        )
        assert f", {tokens // 528} at ratio 4, " in words
    assert report(capsys, *argv)[2]["host_pool_tokens"] == 0


def test_memory_that_is_not_given_is_found(capsys, model_dir):
    argv = ["--model-path", str(model_dir), "--prompt-tokens", "65536"]
    estimate = report(capsys, *argv)[2]
    assert 0 < estimate["pool_tokens"] and estimate["pool_source"]
    main(argv)
    assert "compressing one takes at most 72 MiB of a GPU beside the pool" in capsys.readouterr().out


def test_a_pool_too_small_is_a_problem(capsys, model_dir):
    code, checks, _ = report(capsys, "--model-path", str(model_dir), "--prompt-tokens", "8000", "--pool-tokens", "600")
    assert code == 1 and "0 compressed" in checks["pool"]["found"]


def test_a_folder_without_a_model(capsys, tmp_path):
    code, checks, _ = report(capsys, "--model-path", str(tmp_path), "--metasoft-path", str(tmp_path))
    assert code == 1 and checks["model"]["status"] == "problem"
    assert checks["compressor"]["status"] == checks["features"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens: 0"),
        (["--ratios", "2,0.5"], "--ratios: '2,0.5'"),
        (["--pool-tokens", "5"], "given without --model-path"),
        (["--", "--tp", "2"], "given without --model-path"),
    ],
)
def test_wrong_usage(argv, words):
    with pytest.raises(ValueError, match=words):
        main(argv)


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--metasoft-ratio", "0"], ["--tp", "two"]])
def test_wrong_server_flags_are_wrong_usage(model_dir, flags):
    with pytest.raises(ValueError, match=f"server flags: .*{flags[0]}|server flags: .*ratio|server flags: .*tp"):
        main(["--model-path", str(model_dir), "--", *flags])


def test_the_command_reaches_it_through_its_entry_point(monkeypatch, capsys):
    entry = importlib.metadata.EntryPoint("doctor", "metasoft_patches.doctor.command:main", cli.PLUGIN_GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda **given: [entry] if given["name"] == "doctor" else [])
    assert cli.main(["doctor", "--json"]) == 0 and json.loads(capsys.readouterr().out)["ok"]
    assert cli.main(["doctor", "--ratios", "x"]) == 2 and "--ratios: 'x'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "entry_points", lambda **given: [])
    assert cli.main(["doctor"]) == 2 and "reinstall" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package", "remedy"),
    [
        (["doctor"], "torch", "install SGLang first"),
        (["fit", "model"], "accelerate", "pip install 'sglang-metasoft[train]'"),
    ],
)
def test_a_missing_package_is_said_in_one_sentence(tmp_path, model_dir, arguments, package, remedy):
    """As after ``pip install --no-deps``, or without the extra."""
    words = f"No module named {package!r}"
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError({words!r}, name={package!r})")
    arguments = [str(model_dir) if argument == "model" else argument for argument in arguments]
    script = f"import sys; from sglang_metasoft.cli import main; sys.exit(main({arguments!r}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.strip().count("\n") == 0, done.stderr
    assert f"needs the package {package}" in done.stderr and remedy in done.stderr


def test_exit_codes_of_the_process():
    script = "import sys; from sglang_metasoft.cli import main; sys.exit(main())"
    codes = [
        subprocess.run([sys.executable, "-c", script, *argv], env=os.environ, capture_output=True).returncode
        for argv in (["no-such-command"], ["inspect", "--no-such-flag"], ["--version"])
    ]
    assert codes == [2, 2, 0]
