"""The original's own results, at full vision size: make test-golden.

Checkpoints are generated (5.5 GB each of two seeds, in AGPT_GOLDEN_CACHE or ~/.cache/anomalygpt-edge/golden),
exported, traced, and compared with what the original code computed on the same checkpoints.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import pytest
import torch

from anomalygpt_edge.export import quantize, rounding
from anomalygpt_edge.export.calibration import calibration_pixels, sample_pixels
from anomalygpt_edge.export.gguf_llm import quantise
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.parity import ANSWER_LIMITS, NETWORK_ANSWER_LIMITS
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.precision import convert, remove_originals
from anomalygpt_edge.export.tensorrt_plan import PLAN_ENGINES, PlanOptions, rebuild
from anomalygpt_edge.export.tolerances import TOLERANCES as GATE
from anomalygpt_edge.export.tolerances import error_of
from anomalygpt_edge.kernels import INJECTED
from anomalygpt_edge.runtime.bundles.bundle import Component, Manifest, open_bundle, seal
from anomalygpt_edge.runtime.evaluation.trace import TraceOptions, trace_frame, trace_image
from anomalygpt_edge.runtime.inspection.inspector import Inspector, default_threads
from anomalygpt_edge.runtime.vision.images import read_image

pytestmark = pytest.mark.golden

HERE = Path(__file__).parent
INDEX = json.loads((HERE / "golden.json").read_text())
CASES = {case["id"]: case for case in INDEX["cases"]}
TWO_CROPS = (
    "web_fs1_object_land"  # the original's demo: the embedding of the squeezed image, the map of the crop
)
CLASSES = ("object", "bottle", "metal nut", "pcb")
OTHER_SEED = 12
NUM_BASE_PROMPTS = 9
Change = Callable[[Path, Manifest], dict[str, Component]]
MAP_STEPS = 65535
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]

# Largest difference, absolute or relative to the golden vector's largest value.
TOLERANCES = MappingProxyType(
    {
        "pixels": ("absolute", 1.0),  # grey levels
        "image_embedding": ("relative", 1e-4),
        "patch_features": ("relative", 1e-4),
        "text_features": ("relative", 1e-4),
        "anomaly_map": ("absolute", 1e-3),
        "prompt_embeddings": ("relative", 1e-4),
        "answer_logits": ("relative", 1e-2),  # of the language model in float16
    }
)

# Of the other precisions the gate's own table holds, with the limit of the map that the case has.
STAGES = ("image_embedding", "patch_features", "anomaly_map", "prompt_embeddings", "answer_logits")

sys.path.insert(0, str(HERE.parents[1]))  # tools is never installed
generator = importlib.import_module("tools.random_checkpoints")


@pytest.fixture(scope="module", autouse=True)
def all_threads() -> Iterator[None]:
    """The networks here are large; the other tests' are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache() -> Path:
    default = Path.home() / ".cache" / "anomalygpt-edge" / "golden"
    return Path(os.environ.get("AGPT_GOLDEN_CACHE", default))


@pytest.fixture(scope="module")
def checkpoints(cache: Path):
    return generator.write_checkpoints(INDEX["seed"], cache / "seed11")


@pytest.fixture(scope="module")
def bundle(checkpoints, cache: Path) -> Path:
    return export_bundle(options_of(checkpoints, cache / "bundle11")).bundle


@pytest.fixture(scope="module")
def q8_0_bundle(bundle: Path, cache: Path) -> Iterator[Path]:
    """The same networks, the language model quantised; as ``agpt export --llm-quant q8_0`` publishes it."""
    folder = cache / "bundle11_q8_0"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder, copy_function=os.link)
    manifest = open_bundle(bundle).manifest
    gguf = manifest.components["language_model"].file
    (folder / gguf).unlink()
    (folder / "manifest.json").unlink()
    quantise(bundle / gguf, folder / gguf, "q8_0", default_threads())
    seal(folder, manifest)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def inspector(bundle: Path) -> Iterator[Inspector]:
    with open_inspector(bundle) as opened:
        yield opened


@pytest.fixture(scope="module", params=("fp16", "int8"))
def converted(request, bundle: Path, cache: Path) -> Iterator[tuple[str, Inspector]]:
    """The bundle with its networks in another precision, as ``agpt export --precision`` makes them."""

    def change(folder: Path, manifest: Manifest) -> dict[str, Component]:
        pixels, samples = (
            list(choose([], manifest.preprocess)) for choose in (calibration_pixels, sample_pixels)
        )
        return convert(folder, manifest, request.param, pixels, samples)

    folder = cache / f"bundle11_{request.param}"
    with converted_copy(bundle, folder, change), open_inspector(folder) as opened:
        yield request.param, opened


@contextmanager
def converted_copy(bundle: Path, folder: Path, change: Change) -> Iterator[Path]:
    """A bundle with other networks; for the time of the context."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)  # not links: onnx follows none to weights
    try:
        manifest = open_bundle(bundle, with_plans=False).manifest
        components = change(folder, manifest)
        remove_originals(folder, manifest.components, components)
        (folder / "manifest.json").unlink()
        seal(folder, msgspec.structs.replace(manifest, components=components))
        yield folder
    finally:
        shutil.rmtree(folder)


def open_inspector(bundle: Path) -> Inspector:
    """By the engine that ``make gpu-check`` asks for, its plans built here."""
    engine = os.environ.get("AGPT_GOLDEN_ENGINE", "auto")
    if engine in PLAN_ENGINES:
        rebuild(bundle, [PlanOptions(engine)], lambda: None, allow_failure=True)
    return Inspector.open(bundle, engine=engine)


def options_of(files, out: Path) -> ExportOptions:
    return ExportOptions(**vars(files), text_features=None, out=out, classes=CLASSES)


def golden(case: str, name: str) -> np.ndarray:
    """One vector of a case, equal ones being stored once."""
    with np.load(HERE / "golden.npz") as arrays:
        return arrays[INDEX["aliases"].get(f"{case}/{name}", f"{case}/{name}")]


def golden_prompts(case: str) -> np.ndarray:
    with np.load(HERE / "golden.npz") as arrays:
        return np.concatenate([arrays["base_prompts"], golden(case, "prompt_rows")])


def run_case(inspector: Inspector, case: str, resize: str | None = None) -> dict[str, np.ndarray]:
    """Trace a case as its recipe names it: class and question are told, one resize serves all its images."""
    described = CASES[case]
    inspector.use(inspector.prepare(class_name=described["class_name"]))
    frames = [read_image(HERE / "inputs" / name) for name in (described["image"], *described["normals"])]
    resize = resize or ("stretch" if described["web_demo"] else "crop")
    return trace_frame(inspector, frames[0], frames[1:], resize, described["prompt"])


def tolerances_of(precision: str, case: str) -> dict[str, tuple[str, float]]:
    """Stage → kind and limit, by the table of the gate before publishing."""
    gate = dict(GATE[precision])
    gate |= {"anomaly_map": gate["few_shot_map" if CASES[case]["normals"] else "zero_shot_map"]}
    answers = ("relative", ANSWER_LIMITS["f16"] + NETWORK_ANSWER_LIMITS[precision])
    limits = {stage: (gate[stage].kind, gate[stage].limit) for stage in STAGES[:-1]}
    return limits | {"answer_logits": answers}


def errors(
    case: str, trace: dict[str, np.ndarray], stages=tuple(TOLERANCES), tolerances=TOLERANCES
) -> dict[str, float]:
    """Each stage's difference from the original's result."""
    rows = slice(31, None, 32)  # patches whose features are kept
    norms = np.linalg.norm(trace["patch_features"], axis=-1)
    pairs = {
        "pixels": (golden(case, "pixels"), (trace["pixels"][0] * STD + MEAN) * 255),
        "image_embedding": (golden(case, "image_embedding"), trace["image_embedding"]),
        "patch_features": (golden(case, "patch_rows"), trace["patch_features"][:, rows]),
        "text_features": (golden(case, "text_features"), trace["text_features"]),
        "anomaly_map": (golden(case, "anomaly_map") / np.float32(MAP_STEPS), trace["anomaly_map"]),
        "prompt_embeddings": (golden_prompts(case), trace["prompt_embeddings"]),
        "answer_logits": (golden(case, "answer_logits"), trace["answer_logits"]),
    }
    found = {}
    for stage in stages:
        expected, actual = pairs[stage]
        found[stage] = error_of(expected.astype(np.float32), actual, tolerances[stage][0])
    if "patch_features" in found:
        found["patch_features"] = max(
            found["patch_features"], error_of(golden(case, "patch_norms"), norms, "relative")
        )
    return found


def failed(found: dict[str, float], tolerances=TOLERANCES) -> list[str]:
    """Stages beyond their tolerance; NaN is beyond."""
    return [stage for stage, error in found.items() if not error <= tolerances[stage][1]]


def expected_prompt(case: str) -> list[int]:
    ids = CASES[case]["token_ids"]
    prompts = [INJECTED] * (2 * NUM_BASE_PROMPTS)
    return [ids["bos"], *ids["before"], INJECTED, *ids["middle"], *prompts, *ids["after"]]


def report(capsys: pytest.CaptureFixture[str], case: str, found: dict[str, float]) -> None:
    with capsys.disabled():
        print(f"\n{case}: " + ", ".join(f"{stage} {error:.1e}" for stage, error in found.items()))


def test_generated_checkpoints_are_the_golden_ones(checkpoints, cache):
    expected = json.loads((HERE / "seed11_crc32.json").read_text())
    found: dict[str, list[str]] = {}
    for name, checksum in json.loads((cache / "seed11" / "manifest.json").read_text())["crc32"].items():
        found.setdefault(name.split("/")[0], []).append(checksum)
    assert found == expected


@pytest.mark.parametrize("case", [case for case in CASES if case != TWO_CROPS])
def test_case_is_the_originals(inspector, case, capsys):
    trace = run_case(inspector, case)
    found = errors(case, trace)
    report(capsys, case, found)
    assert not failed(found)
    assert list(trace["prompt_token_ids"]) == expected_prompt(case)
    assert list(trace["answer_token_ids"]) == CASES[case]["greedy_ids"]


@pytest.mark.parametrize("case", CASES)
def test_case_holds_in_other_precisions(converted, case, capsys):
    """Against the original in float32; few-shot and zero-shot maps by their correlation in int8."""
    precision, inspector = converted
    tolerances = tolerances_of(precision, case)
    trace = run_case(inspector, case, "crop" if case == TWO_CROPS else None)
    stages = ("anomaly_map", "prompt_embeddings") if case == TWO_CROPS else STAGES
    found = errors(case, trace, stages, tolerances)
    report(capsys, f"{precision} {case}", found)
    assert not failed(found, tolerances)


def test_plain_rounding_fails(bundle, cache, monkeypatch, capsys):
    """The gate can tell: every token and weight rounded once, to the nearest step, as int8 was at first."""
    monkeypatch.setattr(rounding, "SKEWS", (1.0,))
    monkeypatch.setattr(rounding, "round_weights", lambda weight, tokens: np.rint(weight).astype(np.int8))

    def change(folder: Path, manifest: Manifest) -> dict[str, Component]:
        batches = [{"pixels": pixels} for pixels in islice(calibration_pixels([], manifest.preprocess), 4)]
        encoder = quantize.to_int8(folder / "encoder.onnx", folder / "encoder.int8.onnx", batches)
        return {**manifest.components, "encoder": encoder}

    case = "zs_object_land"
    tolerances = tolerances_of("int8", case)
    with (
        converted_copy(bundle, cache / "bundle11_plain", change) as folder,
        open_inspector(folder) as inspector,
    ):
        found = errors(case, run_case(inspector, case), STAGES, tolerances)
    report(capsys, f"plain int8 {case}", found)
    assert failed(found, tolerances) == ["anomaly_map"]


def test_one_crop_serves_both(inspector, capsys):
    """The original's demo squeezes the image for its embedding, but crops it and the good parts for the map.

    Here one resize serves both, so its answer is nobody's; each half is compared with the resize it was made
    with, and then the answer, given both halves.
    """
    squeezed, cropped = (run_case(inspector, TWO_CROPS, resize) for resize in ("stretch", "crop"))
    found = errors(TWO_CROPS, squeezed, ("pixels", "image_embedding", "patch_features"))
    found |= errors(TWO_CROPS, cropped, ("anomaly_map", "prompt_embeddings"))
    language, question = inspector.language, CASES[TWO_CROPS]["prompt"]
    answer = language.answer(squeezed["image_embedding"], cropped["prompt_embeddings"], question, 16)
    both = {**squeezed, "answer_logits": answer.first_token_logits}
    found |= errors(TWO_CROPS, both, ("answer_logits",))
    report(capsys, TWO_CROPS, found)
    assert not failed(found)
    assert list(answer.token_ids) == CASES[TWO_CROPS]["greedy_ids"]
    pixels = (cropped["pixels"][0] * STD + MEAN) * 255
    assert np.abs(golden(TWO_CROPS, "pixels_of_map") - pixels).max() <= 1
    assert "anomaly_map" in failed(errors(TWO_CROPS, squeezed, ("anomaly_map",)))


def test_class_is_named_not_found_in_the_words(inspector):
    """The original takes "pcb" from an earlier answer of the dialogue; here the recipe's class stays."""
    case = "zs_history_sq"
    named = run_case(inspector, case)
    inspector.use(inspector.prepare())
    frame = read_image(HERE / "inputs" / CASES[case]["image"])
    unnamed = trace_frame(inspector, frame, [], "crop", CASES[case]["prompt"])
    np.testing.assert_array_equal(unnamed["text_features"], inspector.bundle.text_features("object"))
    assert failed(errors(case, unnamed))
    assert not failed(errors(case, named))
    np.testing.assert_array_equal(unnamed["prompt_token_ids"], named["prompt_token_ids"])


def test_command_writes_the_same(inspector, bundle, tmp_path):
    case = "fs2_object_port"
    described = CASES[case]
    normals = tuple(HERE / "inputs" / name for name in described["normals"])
    image = HERE / "inputs" / described["image"]
    trace_image(
        TraceOptions(bundle, image, normals, "object", "crop", described["prompt"]), tmp_path / "trace.npz"
    )
    with np.load(tmp_path / "trace.npz") as written:
        assert not failed(errors(case, dict(written)))


def test_q8_0_begins_the_same(q8_0_bundle, capsys):
    differences = {}
    with Inspector.open(q8_0_bundle) as inspector:
        for case in CASES:
            if case == TWO_CROPS:
                continue
            trace = run_case(inspector, case)
            assert trace["answer_token_ids"][0] == CASES[case]["greedy_ids"][0], case
            differences[case] = errors(case, trace, ("answer_logits",))["answer_logits"]
    with capsys.disabled():
        print(f"\nq8_0 answer_logits: worst {max(differences.values()):.1e}")


def test_another_seed_fails_every_stage(cache):
    """The comparison can tell: a bundle of other checkpoints agrees in nothing but the pixels."""
    files = generator.write_checkpoints(OTHER_SEED, cache / f"seed{OTHER_SEED}")
    out = cache / f"bundle{OTHER_SEED}"
    try:
        with Inspector.open(export_bundle(options_of(files, out)).bundle) as inspector:
            case = "zs_object_land"
            trace = run_case(inspector, case)
        assert failed(errors(case, trace)) == [stage for stage in TOLERANCES if stage != "pixels"]
        assert list(trace["answer_token_ids"]) != CASES[case]["greedy_ids"]
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(cache / f"seed{OTHER_SEED}", ignore_errors=True)
