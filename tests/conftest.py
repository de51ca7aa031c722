"""One small bundle for every test that needs one: random vision weights, a language model with a known answer."""

from __future__ import annotations

import importlib.util
import io
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.models import prompts
from anomalygpt_edge.models.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.llama import Llama, LlamaConfig
from anomalygpt_edge.models.nano.save import save_checkpoint
from anomalygpt_edge.models.prompt_learner import PromptLearnerConfig
from anomalygpt_edge.runtime.vision import resident_stages
from anomalygpt_edge.runtime.vision.engines import plans, tensorrt
from anomalygpt_edge.runtime.vision.engines.device import Device
from anomalygpt_edge.runtime.vision.engines.gpu import Gpu
from tools.cuda_shim import ShimDriver

# The networks here are small, and on a busy machine torch's threads mostly wait for each other.
torch.set_num_threads(1)

TINY_ANSWER = "Yes, at the top left."  # what tiny_bundle says of every image
TINY_CLASSES = ("object", "pcb")
NUM_PIECES = 400


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """``fake_gpu.py``: a driver, pycuda and TensorRT made of NumPy."""
    spec = importlib.util.spec_from_file_location("fake_gpu", Path(__file__).with_name("fake_gpu.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_machine(fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A Jetson Orin and a PC in one: TensorRT 10.3 and TensorRT-RTX 1.7 are installed; CUDA kernels do not load."""

    def no_kernels(stream: object) -> None:
        raise RuntimeError("the fake GPU has no kernels")

    cuda = fakes.FakeCuda()
    apis = {
        "tensorrt": fakes.FakeTensorRt(cuda, "10.3.0.30"),
        "tensorrt-rtx": fakes.FakeTensorRt(cuda, "1.7.1.116", rtx=True),
    }
    found = SimpleNamespace(
        cuda=cuda, apis=apis, device=Device(cuda), gpu=Gpu("Orin", "8.7", integrated=True)
    )
    monkeypatch.setattr(resident_stages, "PycudaDriver", no_kernels)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: found.gpu)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: name == "pycuda")
    monkeypatch.setattr(tensorrt, "is_installed", lambda engine: engine in apis)
    monkeypatch.setattr(tensorrt, "open_api", apis.__getitem__)
    monkeypatch.setattr(tensorrt, "open_device", lambda: found.device)
    monkeypatch.setattr(plans, "is_installed", lambda engine: False)  # the fakes have no headers to look at
    monkeypatch.setenv("AGPT_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture(scope="module")
def shim() -> Iterator[ShimDriver]:
    """The CUDA kernels, compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the shim is compiled with g++: install it")
    driver = ShimDriver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like sentencepiece model: byte fallback, dummy prefix, the original's words."""
    lines = [
        *(prompts.answer([place]) for place in prompts.PLACES), prompts.answer([]), TINY_ANSWER, "No.",
        prompts.PIECE_BEFORE_IMAGE, prompts.PIECE_AFTER_IMAGE, prompts.DEFAULT_QUESTION, "x##y",
    ]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=model, model_type="bpe", vocab_size=NUM_PIECES,
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Path) -> AnomalyGPT:
    """Its prompt learner reads the map alone, as the original's does."""
    return make_tiny_model(tiny_tokenizer)


@pytest.fixture(scope="session")
def seeing_model(tiny_tokenizer: Path) -> AnomalyGPT:
    """Its prompt learner reads evidence and looks at the picture beside the map."""
    return make_tiny_model(tiny_tokenizer, evidence_width=16, look_channels=(4, 4, 8))


def make_tiny_model(
    tiny_tokenizer: Path, evidence_width: int = 0, look_channels: tuple[int, int, int] | None = None
) -> AnomalyGPT:
    """Nano's topology with fewer channels; every weight random but the words of the language model."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    torch.manual_seed(0)
    model = AnomalyGPT(
        AnomalyGPTConfig(
            VisionConfig(width=32, depth=4, heads=2, mlp_width=64, embed_dim=16, tap_layers=(0, 1, 2, 3)),
            PromptLearnerConfig((4, 4, 8, 8, 8), 64, evidence_width, look_channels),
            LlamaConfig(tokenizer.get_piece_size(), 64, 96, 2, 4, max_position_embeddings=256),
        )
    ).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("cls_token", "pos_embed")):
            parameter += 0.1 * torch.randn_like(parameter)
    if look_channels:
        for parameter in model.prompt_learner.look_net.parameters():
            parameter *= 3  # what it sees is to be told from other things
    teach_answer(model.llama, tokenizer)
    return model.eval()


def teach_answer(llama: Llama, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Make each token of the answer the successor of the one before, whatever the image shows.

    The residual stream stays close to the last token's embedding, and the output row of a token is the
    embedding of its predecessor.
    """
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight *= 0.02
        layer.mlp.down_proj.weight *= 0.02
    embeddings = llama.model.embed_tokens.weight
    embeddings /= embeddings.norm(dim=1, keepdim=True)
    chain = [
        tokenizer.encode(prompts.DEFAULT_QUESTION + prompts.PIECE_ASSISTANT)[-1],
        *tokenizer.encode(TINY_ANSWER),
        tokenizer.piece_to_id("<0x0A>"),
        tokenizer.piece_to_id(prompts.STOP_PIECE),
    ]
    assert len(set(chain)) == len(chain), "a token with two successors cannot be taught"
    for token, successor in itertools.pairwise(chain):
        llama.lm_head.weight[successor] = embeddings[token]


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_model: AnomalyGPT, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A sealed bundle folder. Shared: tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("tiny_bundle")
    return export_bundle(save_tiny_model(tiny_model, tiny_tokenizer, folder)).bundle


@pytest.fixture(scope="session")
def seeing_options(
    seeing_model: AnomalyGPT, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportOptions:
    """How ``seeing_bundle`` is exported."""
    return save_tiny_model(seeing_model, tiny_tokenizer, tmp_path_factory.mktemp("seeing_bundle"))


@pytest.fixture(scope="session")
def seeing_bundle(seeing_options: ExportOptions) -> Path:
    """The same of ``seeing_model``."""
    return export_bundle(seeing_options).bundle


def save_tiny_model(model: AnomalyGPT, tiny_tokenizer: Path, folder: Path) -> ExportOptions:
    """Its checkpoints, and the options that make the bundle beside them."""
    checkpoint = folder / "checkpoint"
    rng = np.random.default_rng(0)
    features = {name: rng.standard_normal((2, 16)).astype(np.float32) for name in TINY_CLASSES}
    features = {
        name: value / np.linalg.norm(value, axis=1, keepdims=True) for name, value in features.items()
    }
    save_checkpoint(model, tiny_tokenizer, features, {"few_shot": 0.3, "zero_shot": None}, checkpoint)
    return ExportOptions.of_folder(checkpoint, folder / "bundle")
