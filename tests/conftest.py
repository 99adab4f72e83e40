"""Shared fixtures: the demo model, real text, and real servers."""

import importlib
import logging
import os
import pkgutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, here alone: servers that tests start do not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    import metasoft_kernels
    import triton.experimental.gluon  # noqa: F401  (the interpreter would import it later)

    for module in pkgutil.walk_packages(metasoft_kernels.__path__, "metasoft_kernels."):
        importlib.import_module(module.name)
    del os.environ["TRITON_INTERPRET"]

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.local_server import Server
from tests.server.forked import start as start_one

DEMO_FOLDER = Path(os.environ.get("METASOFT_DEMO_DIR", Path(__file__).parents[1] / demo_model.FOLDER))

TEST_LAYERS = 6
OWN_PACKAGES = {"sglang_metasoft", "metasoft_patches", "metasoft_kernels"}

# Unset, as in CI, everything that is drawn is the same every time; a nightly run (`make fuzz`) sets it.
FUZZ_SEED = os.environ.get("METASOFT_FUZZ_SEED")


def pytest_report_header() -> str:
    return f"METASOFT_FUZZ_SEED={FUZZ_SEED}" if FUZZ_SEED else "fixed seeds; METASOFT_FUZZ_SEED=NUMBER draws others"


@pytest.fixture(scope="session")
def full_model_dir() -> Path:
    """The demo model, downloaded and converted once."""
    return demo_model.prepare(DEMO_FOLDER / demo_model.NAME)


@pytest.fixture(scope="session")
def model_dir(full_model_dir) -> Path:
    """The demo model's first layers, which is all that tests of the machinery need, and takes a fifth of the time.

    Tests of what the model says override this with ``full_model_dir``.
    """
    return make_first_layers(full_model_dir)


def make_first_layers(full_model_dir: Path) -> Path:
    """Write the folder of :func:`model_dir`, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DEMO_FOLDER / f"first-{TEST_LAYERS}-layers"
    with FileLock(f"{folder}.lock"):  # two pytest processes share the folder
        if not demo_model.is_ready(folder):
            model = AutoModelForCausalLM.from_pretrained(full_model_dir, num_hidden_layers=TEST_LAYERS, dtype="auto")
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(full_model_dir).save_pretrained(folder)
            (folder / "ready").touch()
    return folder


@pytest.fixture(scope="session")
def tokenizer(full_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(full_model_dir)


@pytest.fixture(scope="session")
def document() -> str:
    """The shipped public-domain document (about 5,000 tokens)."""
    return DOCUMENT.read_text()


@pytest.fixture(scope="session")
def document_ids(tokenizer, document) -> list[int]:
    return tokenizer(document)["input_ids"]


@pytest.fixture(scope="module")  # whose own ``model_dir`` it is made for
def compressor_dir(model_dir, tmp_path_factory):
    """A compressor written to disk, as training would; its weights are random, its gates not all one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    shape = read_shape(model_dir)
    table = model.get_input_embeddings()
    soft = SoftTokens.untrained(shape, 16, lambda ids: table(ids).detach(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    soft.scorer = EntryScorer(shape.num_layers, shape.num_kv_heads, shape.head_dim, 8)
    soft.sizes |= {"scorer": 8, "head_dim": shape.head_dim}
    features = soft.scorer.hidden.shape[-2]
    heads = (shape.num_layers, shape.num_kv_heads, features)
    soft.scorer.initialize(torch.zeros(heads), torch.ones(heads), generator)
    for parameter in (soft.scorer.out, soft.scorer.neighbours):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    soft.gate_scale.copy_(torch.rand(soft.gate_scale.shape, generator=generator))
    soft.trunk.bias.copy_(torch.randn(soft.trunk.bias.shape, generator=generator))
    folder = tmp_path_factory.mktemp("compressor")
    soft.save(folder, shape)
    return folder


@pytest.fixture(scope="module")
def start_server(model_dir, tmp_path_factory):
    """Start a server with further flags; stopped when the module's tests end, or when the next one starts."""
    running: list[Server] = []

    def start(*flags: str, **kwargs) -> Server:
        while running:
            running.pop().stop()
        flags += ("--sleep-on-idle",)  # else an idle scheduler spins on a core that the other tests want
        if "--enable-metrics" in flags:  # else gauges of an idle server may be half a minute old
            flags += ("--decode-log-interval", "1")
        server = start_one(model_dir, flags, log=tmp_path_factory.mktemp("server") / "server.log", **kwargs)
        running.append(server)
        return server

    yield start
    while running:
        running.pop().stop()


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """SGLang's own set-up of logging, which a test may run, sets the root's level and switches older loggers off."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    for name, logger in logging.getLogger().manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] in OWN_PACKAGES:
            logger.disabled = False


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A compressor that was fitted on this machine must not change what a test sees; other caches stay in place."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("HF_HOME", "huggingface"), ("PIP_CACHE_DIR", "pip"), ("MPLCONFIGDIR", "matplotlib")):
            patch.setenv(name, os.environ.get(name, os.path.join(cache, folder)))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(int(FUZZ_SEED or 0))
