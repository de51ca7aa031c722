"""From checkpoint files to a published bundle, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from anomalygpt_edge.export import pipeline, staging
from anomalygpt_edge.export.gguf_llm import write_gguf
from anomalygpt_edge.export.options import ExportOptions, parse_size
from anomalygpt_edge.export.parity import ParityError
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.samples import draw_part
from anomalygpt_edge.export.tensor_files import CheckpointError
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.cli.main import app, main
from anomalygpt_edge.runtime.common.errors import AgptError, ConfigError
from anomalygpt_edge.runtime.inspection.inspector import Inspector


@pytest.fixture
def options(small, tmp_path) -> ExportOptions:
    return ExportOptions(*small.paths, out=tmp_path / "bundle")


def test_bundle_opens_and_describes_itself(exported, small):
    manifest = open_bundle(exported.bundle).manifest
    config = small.config
    assert manifest.name == "anomalygpt"
    assert "forbid commercial use" in manifest.notices[0]
    assert manifest.language.vocab_size == config.llama.vocab_size
    assert manifest.language.width == config.llama.hidden_size
    assert manifest.vision.tap_layers == [0, 1, 2, 3]
    assert manifest.preprocess.size == 224
    assert manifest.classes == ["object", "metal nut"]
    assert manifest.default_class == "object"
    assert manifest.components["language_model"].precision == "f16"
    assert manifest.parity["passed"] is True
    assert "pandagpt/pandagpt.pt" in manifest.sources
    assert "vicuna/tokenizer.model" in manifest.sources
    assert str(small.imagebind.parent) not in (exported.bundle / "manifest.json").read_text()


def test_runtime_inspects_with_the_bundle(exported):
    with Inspector.open(exported.bundle, threads=1) as inspector:
        verdict = inspector.inspect(draw_part(seed=7, scratched=True))
    assert "llama" not in verdict.reason  # a random model says anything, but it does speak
    assert np.isfinite(verdict.anomaly_map).all()
    assert 0 <= verdict.p_anomaly <= 1


def test_about_classes_resize_and_quantisation(options, nano_folder, exported_networks):
    report = export_bundle(
        replace(
            options,
            about=nano_folder / "model.json",
            classes=("metal nut",),
            resize="stretch",
            llm_quant="q8_0",
        )
    )
    manifest = open_bundle(options.out).manifest
    assert manifest.name == "nano"
    assert manifest.region_level.few_shot == 0.3
    assert manifest.region_level.zero_shot is None
    assert (manifest.classes, manifest.default_class) == (["metal nut"], "metal nut")
    assert manifest.preprocess.resize == "stretch"
    assert manifest.components["language_model"].precision == "q8_0"
    assert [result.stage for result in report.parity][-2:] == ["answer_logits q8_0", "answer_tokens q8_0"]
    assert not list(options.out.glob("*.f16"))


def test_wrong_merge_is_not_published_unless_allowed(options, exported_networks, monkeypatch):
    def without_lora(source, path, name, advance):
        write_gguf(replace(source, lora=None), path, name, advance)

    monkeypatch.setattr(pipeline, "write_gguf", without_lora)
    with pytest.raises(ParityError, match="nothing was published"):
        export_bundle(options)
    assert not list(options.out.parent.iterdir())
    export_bundle(replace(options, allow_parity_failure=True))
    assert open_bundle(options.out).manifest.parity["passed"] is False


def stop(error: BaseException):
    """A stage that writes half a file and ends so."""

    def begin(source, path, *arguments):
        path.write_bytes(b"half")
        raise error

    return begin


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ConfigError,
            "No space left.*continues after the last",
        ),
    ],
)
def test_an_export_that_ends_early_goes_on(
    options, exported, exported_networks, monkeypatch, error, expected, words
):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "write_gguf", stop(error))
        with pytest.raises(expected, match=words):
            export_bundle(options)
    assert not options.out.exists()
    monkeypatch.setattr(pipeline, "export_networks", stop(AssertionError("made twice")))
    export_bundle(options)
    assert open_bundle(options.out).manifest.files == exported.manifest.files  # the half file is gone
    assert list(options.out.parent.iterdir()) == [options.out]


@pytest.mark.parametrize("greedy", [np.ones, torch.ones])
def test_an_export_out_of_memory_says_so_and_goes_on(
    options, exported, exported_networks, monkeypatch, greedy
):
    with monkeypatch.context() as starved:
        starved.setattr(pipeline, "write_gguf", lambda *given: greedy(1 << 50))
        with pytest.raises(ConfigError, match=r"memory ran out .*locate.*continues after the last"):
            export_bundle(options)
    monkeypatch.setattr(pipeline, "export_networks", stop(AssertionError("made twice")))
    export_bundle(options)
    assert open_bundle(options.out).manifest.files == exported.manifest.files


def test_a_quantisation_that_ends_early_goes_on(options, exported_networks, monkeypatch):
    options = replace(options, llm_quant="q8_0")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "quantise", stop(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(options)
    monkeypatch.setattr(pipeline, "write_gguf", stop(AssertionError("made twice")))
    report = export_bundle(options)
    assert "answer_logits f16" in [result.stage for result in report.parity]  # compared again
    assert not list(options.out.glob("*f16*"))


@pytest.mark.parametrize("change", ["option", "input", "damage"])
def test_what_changed_is_made_anew(
    options, originals, copy_of, exported_networks, tmp_path, monkeypatch, change
):
    def interrupt() -> None:
        with monkeypatch.context() as interrupted:
            interrupted.setattr(pipeline, "quantise", stop(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                export_bundle(options)

    options = replace(options, llm_quant="q8_0")
    interrupt()
    staged = next(options.out.parent.glob(".*.partial"))
    if change == "option":
        options = replace(options, llm_quant="q4_0")
    elif change == "input":
        delta = tmp_path / "other.pt"
        delta.write_bytes(options.pandagpt.read_bytes() + b"\0")
        options = replace(options, pandagpt=delta)
    else:
        damaged = bytearray((staged / "llm.f16.gguf").read_bytes())
        damaged[-1] ^= 1
        (staged / "llm.f16.gguf").write_bytes(damaged)
    made = []
    monkeypatch.setattr(pipeline, "write_gguf", lambda *given: (made.append(given), write_gguf(*given))[0])
    interrupt()
    assert len(made) == 1


def test_a_mistake_on_the_way_keeps_what_is_finished(options, exported_networks, monkeypatch, tmp_path):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "write_gguf", stop(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(options)
    with pytest.raises(CheckpointError, match="does not exist"):
        export_bundle(replace(options, pandagpt=tmp_path / "none.pt"))
    monkeypatch.setattr(pipeline, "export_networks", stop(AssertionError("made twice")))
    export_bundle(options)


def test_damaged_weights_leave_nothing(options, exported_networks, monkeypatch):
    monkeypatch.setattr(pipeline, "write_gguf", stop(CheckpointError("a weight holds NaN")))
    with pytest.raises(CheckpointError, match="holds NaN"):
        export_bundle(options)
    assert not list(options.out.parent.iterdir())


def test_a_model_that_memory_cannot_hold_is_compared_on_first_tokens(options, tmp_path):
    gguf = tmp_path / "llm.gguf"
    gguf.write_bytes(bytes(100))
    counts = [pipeline.num_tokens(gguf, replace(options, max_memory=limit)) for limit in (None, 201, 200)]
    assert counts == [16, 16, 1]


def test_memory_that_does_not_fit_is_refused_at_once(options):
    with pytest.raises(
        ConfigError, match=r"takes about \d+\.\d GB of memory, but --max-memory allows 0\.0 GB"
    ):
        export_bundle(replace(options, max_memory=1000))
    assert not list(options.out.parent.iterdir())
    assert [parse_size(text) for text in ("8G", "1.5g", "512MB", "100")] == [8e9, 1.5e9, 512e6, 100]
    for text in ("8X", "", "-1G", "0"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(text)


def test_a_disk_that_is_too_small_is_refused_at_once(options, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"takes about \d+\.\d GB of disk, but .* has 0\.0 GB free"):
        export_bundle(options)
    assert not list(options.out.parent.iterdir())


def test_a_second_export_to_one_place_is_kept_out(options, exported, exported_networks):
    folder = staging.staging_folder(options)
    with staging.exclusive(folder):
        (folder / "encoder.onnx").write_bytes(b"of the first")
        with pytest.raises(ConfigError, match="another export is writing"):
            export_bundle(options)
        assert (folder / "encoder.onnx").read_bytes() == b"of the first"
    export_bundle(options)
    assert open_bundle(options.out).manifest.files == exported.manifest.files


def test_bundle_is_replaced_but_nothing_else(options, exported, exported_networks):
    shutil.copytree(exported.bundle, options.out)
    (options.out / "manifest.json").write_text("{}")
    export_bundle(options)
    assert open_bundle(options.out).manifest.files == exported.manifest.files  # same input, same bytes
    holiday = options.out.parent / "photos"
    holiday.mkdir()
    (holiday / "beach.jpg").write_bytes(b"...")
    with pytest.raises(ConfigError, match="exists and is not a bundle"):
        replace(options, out=holiday)
    assert (holiday / "beach.jpg").exists()


def test_bad_options_are_one_sentence(options, nano_folder, tmp_path):
    for changed, words in (
        ({"llm_quant": "q3"}, "--llm-quant q3 is not available"),
        ({"precision": "int4"}, "--precision int4 is not available"),
        ({"engines": ("onnx", "openvino")}, "--engine openvino is not available"),
        ({"resize": "pad"}, "--resize pad is not available"),
        ({"out": nano_folder / "model.json"}, "is a file"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(options, **changed)
    with pytest.raises(ConfigError, match="class 'dragon' has no text features"):
        export_bundle(replace(options, classes=("dragon",)))
    about = tmp_path / "model.json"
    about.write_text(json.dumps({"name": "x", "notices": [], "licence": "?"}))
    with pytest.raises(CheckpointError, match="does not describe a model"):
        export_bundle(replace(options, about=about))


def arguments(small, out) -> list[str]:
    roles = ("imagebind", "vicuna", "pandagpt", "anomalygpt", "text-features")
    pairs = [(f"--{role}", str(path)) for role, path in zip(roles, small.paths, strict=True)]
    return [word for pair in pairs for word in pair] + ["--out", str(out)]


def test_command_exports_and_reports(small, tmp_path, exported_networks, capsys):
    app(args=["export", *arguments(small, tmp_path / "bundle")], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "Parity with the checkpoints" in printed
    assert "answer_tokens f16" in printed
    assert "classes: object, metal nut" in printed
    assert "needs onnxruntime, llama-cpp-python, NumPy and OpenCV, no torch" in printed
    assert f"try it: agpt run --bundle {tmp_path / 'bundle'}\n" in printed  # in one line, to be copied
    assert open_bundle(tmp_path / "bundle").manifest.name == "anomalygpt"


def test_command_mistakes(small, tmp_path, monkeypatch, capsys):
    missing = replace(small, pandagpt=tmp_path / "none.pt")
    with pytest.raises(AgptError, match=r"none\.pt does not exist"):
        app(args=["export", *arguments(missing, tmp_path / "bundle")], standalone_mode=False)
    monkeypatch.setattr(sys, "argv", ["agpt", "export", *arguments(missing, tmp_path / "bundle")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("agpt: ")
