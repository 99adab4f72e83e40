"""The whole run on a tiny model: what it writes, resumption, interruption, a full disk."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_metasoft import cli
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.train import checkpoint
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.command import train
from sglang_metasoft.train.curves import Curves

CPU = torch.device("cpu")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.NAME)


def test_a_run_writes_what_the_server_loads(settings, tiny_model):
    s = settings()
    scores = train(s)
    backbone = Backbone(str(tiny_model), CPU, torch.float32)
    soft = SoftTokens.load(str(s.output / "compressor"), backbone.shape, backbone.embed, CPU)
    assert soft.count == 4 and soft.scorer is not None
    assert (s.output / "compressor" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (s.output / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "divergence" in row] == list(range(1, 7))
    assert all("orthogonality" in row for row in rows if "divergence" in row)
    for method in ("metasoft", "snapkv", "oracle"):
        assert {f"overlap {method} inside 4x", f"answer loss {method} boundary 8x"} <= scores.keys()
    assert scores["overlap oracle inside 4x"] == 1
    assert not (s.output / "compressor").joinpath("model.bin").exists()


def test_training_lowers_the_loss(settings):
    s = settings(steps=40, selector_steps=5, cases=2)
    train(s)
    rows = [json.loads(line) for line in (s.output / "curves.jsonl").read_text().splitlines()]
    losses = [row["divergence"] for row in rows if "divergence" in row]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_the_library_stays_nearly_orthonormal_and_is_frozen_in_stage_two(settings):
    s = settings(steps=3, selector_steps=0)
    train(s)
    before = weights(s.output)["module.soft.library"]
    gram = before @ before.t()
    assert (gram - torch.eye(len(gram))).square().sum() < 0.5
    s = settings(steps=3, selector_steps=2, output=s.output.with_name("longer"))
    train(s)
    after = weights(s.output)
    assert torch.equal(after["module.soft.bias"][0].isfinite(), torch.ones_like(after["module.soft.bias"][0]).bool())
    # The learning rate's schedule differs with the number of steps, so compare within the second run.
    assert after["optimiser.soft.library.step"] == 3 and after["optimiser.soft.bias.step"] == 5


@pytest.mark.parametrize("method", ["metasoft", "judge_q"])
def test_an_interrupted_run_continues_to_the_same_weights(settings, monkeypatch, method):
    whole = settings(method=method, output=settings().output.with_name("whole"))
    train(whole)
    cut = settings(method=method, checkpoint_every=3, output=whole.output.with_name("cut"))
    add = Curves.add

    def interrupt(self, step, values):
        if step == 5:
            raise KeyboardInterrupt
        add(self, step, values)

    if method == "metasoft":
        monkeypatch.setattr(Curves, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    else:
        monkeypatch.setattr(Curves, "add", lambda self, step, values: interrupt(self, step + 1, values))
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    monkeypatch.setattr(Curves, "add", add)
    last = weights(cut.output)
    train(cut)
    done, expected = weights(cut.output), weights(whole.output)
    assert done.keys() == expected.keys() and any(not torch.equal(done[name], last[name]) for name in done)
    for name, tensor in expected.items():
        assert torch.equal(done[name], tensor), name


@pytest.mark.parametrize(
    ("features", "same_span", "same_tail"),
    [("both", False, False), ("span", False, True), ("tail", True, False), ("none", True, True)],
)
def test_the_selector_reads_what_it_is_told_to(settings, tiny_model, features, same_span, same_tail):
    s = settings(selector_features=features, map_loss="squared")
    train(s)
    backbone = Backbone(str(tiny_model), CPU, torch.float32)
    soft = SoftTokens.load(str(s.output / "compressor"), backbone.shape, backbone.embed, CPU)
    one, other = (torch.arange(start, start + 30) for start in (10, 200))
    tokens = soft(backbone.embed, one, one)
    assert torch.equal(soft(backbone.embed, other, one), tokens) is same_span
    assert torch.equal(soft(backbone.embed, one, other), tokens) is same_tail


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(settings, monkeypatch):
    s = settings(checkpoint_every=3)
    add, limits = Curves.add, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, step, values):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        add(self, step, values)

    monkeypatch.setattr(Curves, "add", fill)
    try:
        with pytest.raises(ValueError, match="checkpoint.safetensors could not be written"):
            train(s)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights(s.output)["optimiser.soft.bias.step"] == 3
    assert [file.name for file in s.output.glob(".*")] == []
    monkeypatch.setattr(Curves, "add", add)
    train(s)


def test_other_settings_do_not_continue_a_run(settings):
    train(settings())
    with pytest.raises(ValueError, match="other settings: soft_tokens 4 there, 5 here"):
        train(settings(soft_tokens=5))


def test_a_damaged_checkpoint_is_named(settings):
    s = settings()
    s.output.mkdir()
    (s.output / checkpoint.NAME).write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read.*delete it to start again"):
        train(s)


def test_static_tokens_are_written_as_judge_q(settings):
    s = settings(method="judge_q")
    train(s)
    config = json.loads((s.output / "compressor" / "config.json").read_text())
    tensors = load_file(s.output / "compressor" / "model.safetensors")
    assert config["method"] == "judge_q" and tensors["static_tokens"].shape == (4, 48)
    assert sorted(tensors) == ["embedding_check", "static_tokens"]


def test_the_loss_cuts_at_the_ratios_that_were_given(settings):
    made = []
    for name, ratios in (("low", (2.0,)), ("high", (30.0,)), ("again", (30.0,))):
        s = settings(ratios=ratios, output=settings().output.with_name(name))
        train(s)
        row = json.loads((s.output / "curves.jsonl").read_text().splitlines()[0])
        made.append((row["divergence"], row["lost"]))
    (low, lost_low), (high, lost_high), again = made
    assert again == (high, lost_high)
    assert low == high and lost_low < lost_high  # the first step's map loss has no cut; a higher ratio loses more


def test_the_answers_are_cut_as_the_setting_says(settings):
    first_steps = []
    for cut in ("span", "prompt"):
        s = settings(answer_cut=cut, ratios=(2.0,), output=settings().output.with_name(cut))
        train(s)
        first_steps.append(json.loads((s.output / "curves.jsonl").read_text().splitlines()[0]))
    by_span, by_prompt = first_steps
    assert by_span["lost inside"] == by_prompt["lost inside"]  # the maps' cut is by the span in both
    assert by_span["answer divergence inside"] != by_prompt["answer divergence inside"]
    assert by_span["answer divergence boundary"] == by_prompt["answer divergence boundary"]  # nothing follows the span


@pytest.mark.parametrize(
    "method, gate, biases", [("metasoft", 0, True), ("metasoft", 0.5, False), ("judge_q", 0, False)]
)
def test_losses_reckon_with_the_consolidation_that_will_serve(settings, method, gate, biases):
    rows, scores = {}, {}
    for name in ("auto", "none", "key_bias"):
        s = settings(method=method, gate=gate, consolidation=name, output=settings().output.with_name(name))
        scores[name] = train(s)
        first = (s.output / "curves.jsonl").read_text().splitlines()[0]
        rows[name] = {key: value for key, value in json.loads(first).items() if key != "step"}
    assert rows["auto"] == rows["key_bias" if biases else "none"]
    assert rows["none"]["divergence"] == rows["key_bias"]["divergence"]  # the maps are the same
    assert rows["none"]["lost"] > rows["key_bias"]["lost"]  # to lose an entry is not to lose its kind
    assert rows["none"]["answer divergence"] != rows["key_bias"]["answer divergence"]
    for ranker in ("snapkv", "oracle"):
        key = f"answer loss {ranker} boundary 8x"
        assert scores["none"][key] != scores["key_bias"][key]


@pytest.mark.parametrize("method, tensor", [("metasoft", "library"), ("judge_q", "static_tokens")])
def test_a_run_starts_from_a_compressor(settings, method, tensor):
    first = settings(method=method)
    train(first)
    trained = load_file(first.output / "compressor" / "model.safetensors")[tensor].float()
    second = settings(
        method=method, init=(first.output / "compressor",), output=first.output.with_name("second"), learning_rate=1e-9
    )
    train(second)
    torch.testing.assert_close(weights(second.output)[f"module.{'soft.' * (method == 'metasoft')}{tensor}"], trained)
    other = "judge_q" if method == "metasoft" else "metasoft"
    with pytest.raises(ValueError, match=f"method '?{method}"):
        train(settings(method=other, init=(first.output / "compressor",), output=first.output.with_name("third")))


@pytest.mark.parametrize("method", ["metasoft", "judge_q"])
def test_the_mean_of_several_runs(settings, method):
    """Without a step, what is written is the mean of what was read; of other shapes there is none."""
    made = []
    for seed in (1, 2):
        s = settings(method=method, seed=seed, output=settings().output.with_name(f"seed{seed}"))
        train(s)
        made.append(s.output / "compressor")
    out = settings().output.with_name("mean")
    scores = train(settings(method=method, init=tuple(made), steps=0, selector_steps=0, output=out))
    first, second, mean = (load_file(path / "model.safetensors") for path in (*made, out / "compressor"))
    assert mean and not all(torch.equal(first[name], second[name]) for name in mean)
    for name, tensor in mean.items():
        assert torch.equal(tensor, torch.stack([first[name].float(), second[name].float()]).mean(0).bfloat16())
    assert any(name.startswith(f"answer loss {method}") for name in scores)
    assert (out / "scores.json").is_file() and (out / "compressor" / "curves.png").is_file()
    train(s := settings(method=method, soft_tokens=3, output=settings().output.with_name("small")))
    with pytest.raises(ValueError, match="allowed: compressors of one model and one shape"):
        train(settings(method=method, init=(made[0], s.output / "compressor"), steps=0, output=out.with_name("no")))


def test_the_command_names_what_is_wrong(capsys, tmp_path, tiny_model, corpus):
    def run(*flags) -> str:
        base = ["train", "--model", str(tiny_model), "--data", str(corpus), "--output", str(tmp_path / "out")]
        assert cli.main([*base, *flags]) == 2
        return capsys.readouterr().err

    assert "soft_tokens: 0 is not allowed; allowed: at least 1" in run("--soft-tokens", "0")
    assert "steps: 0 is not allowed; allowed: at least 1" in run("--steps", "0")
    assert "ratios: 1.0 is not allowed; allowed: one number above 1" in run("--ratios", "4", "1")
    assert "'/no/such' holds no Hugging Face model" in run("--model", "/no/such")
    assert "holds no text" in run("--data", str(tmp_path))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 3}\n')
    assert "bad.jsonl:1" in run("--data", str(bad))
    assert "no case of 350 to" in run("--exclude", str(corpus))
    assert "no case of 20000 to" in run("--min-prefix-tokens", "20000", "--max-prefix-tokens", "30000")


def test_two_processes_train_as_one_with_twice_the_batch(settings, tmp_path):
    """The averaged gradient is that of one process that takes all contexts; Adam's first mean is a tenth of it."""
    alone = settings(batch=4, steps=1, selector_steps=0)
    train(alone)
    flags = {
        "--model": alone.model, "--data": alone.data, "--prepared": alone.prepared, "--output": tmp_path / "two",
        "--soft-tokens": 4, "--scorer-width": 4, "--cases": 3, "--steps": 1, "--selector-steps": 0, "--batch": 2,
        "--min-prefix-tokens": 80, "--max-prefix-tokens": 120, "--window": 16, "--answer-tokens": 8,
        "--validation-cases": 1,
    }  # fmt: skip
    # On a CPU `accelerate launch --num_processes 2` starts one process; on GPUs it starts torchrun itself.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "sglang_metasoft.cli", "train", *(str(part) for pair in flags.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = weights(tmp_path / "two"), weights(alone.output)
    gradients = {name: tensor for name, tensor in one.items() if name.endswith(".exp_avg")}
    assert len(gradients) == 13
    for name, tensor in gradients.items():
        # Nothing reaches a hidden layer in the first step: its output starts at 0.
        assert (tensor.abs().max() > 0) is not (".hidden" in name), name
        torch.testing.assert_close(two[name], tensor, atol=1e-3 * tensor.abs().max().item(), rtol=1e-3, msg=name)
