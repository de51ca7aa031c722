"""A bundle opens only if it is complete; otherwise one sentence names the file and the fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles import bundle as bundle_module
from anomalygpt_edge.runtime.bundles.bundle import (
    MANIFEST_FILE,
    TEXT_FEATURES_FILE,
    default_bundle,
    open_bundle,
    publish,
    read_manifest,
    seal,
)
from anomalygpt_edge.runtime.common.errors import BundleError, ConfigError


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rewrite_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_complete_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.component_file("encoder").name in opened.manifest.files
    assert opened.encoder_sha256 == opened.manifest.files["encoder.onnx"].sha256
    features = opened.text_features("pcb")
    assert features.shape == (2, opened.manifest.vision.embed_dim)
    np.testing.assert_array_equal(opened.text_features(), opened.text_features("object"))


def test_the_error_for_an_unknown_class_lists_the_classes(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown class name 'banana': choose one of object, pcb"):
        open_bundle(bundle).text_features("banana")


@pytest.mark.parametrize(
    "name", ["encoder.onnx", "decoder.onnx", "prompt_learner.onnx", "llm.gguf", TEXT_FEATURES_FILE]
)
def test_one_flipped_bit_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} was altered: sha256 .* re-run agpt export"):
        open_bundle(bundle)


def test_a_cut_file_is_found(bundle: Path) -> None:
    data = (bundle / "llm.gguf").read_bytes()
    (bundle / "llm.gguf").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"llm\.gguf was altered: \d+ bytes instead of \d+"):
        open_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx is missing"):
        open_bundle(bundle)


def test_a_file_that_is_not_listed_is_refused(bundle: Path) -> None:
    (bundle / "encoder.onnx.data").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data is not part of the bundle"):
        open_bundle(bundle)


def test_links_are_refused(bundle: Path, tmp_path: Path) -> None:
    real = (bundle / "llm.gguf").rename(tmp_path / "elsewhere.gguf")
    (bundle / "llm.gguf").symlink_to(real)
    with pytest.raises(BundleError, match="link"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["../llm.gguf", "/etc/passwd", "sub/llm.gguf", "..", "a\\b", MANIFEST_FILE])
def test_names_that_leave_the_folder_are_refused(bundle: Path, name: str) -> None:
    rewrite_manifest(bundle, lambda m: m["files"].update({name: m["files"]["llm.gguf"]}))
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99, but this program reads 4"),
        (lambda m: m.update(threshold=0.5), "threshold"),
        (lambda m: m["vision"].update(depth=3), "depth"),
        (lambda m: m.pop("classes"), "classes"),
        (lambda m: m.update(default_class="banana"), "banana"),
        (lambda m: m["components"].pop("encoder"), "'encoder' is missing"),
        (lambda m: m["components"]["encoder"].update(file="other.onnx"), r"does not list 'other\.onnx'"),
        (lambda m: m["preprocess"].update(std=[1.0, 0.0, 1.0]), "positive standard deviations"),
        (lambda m: m["preprocess"].update(resize="zoom"), "zoom"),
        (lambda m: m["files"]["llm.gguf"].update(sha256="abc"), "sha256"),
    ],
)
def test_a_malformed_manifest_is_refused(
    bundle: Path, change: Callable[[dict], None], complaint: str
) -> None:
    rewrite_manifest(bundle, change)
    with pytest.raises(BundleError, match=complaint):
        open_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BundleError, match="malformed"):
        open_bundle(bundle)


def test_a_folder_that_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)


def test_text_features_of_another_shape_are_refused(bundle: Path) -> None:
    np.savez(bundle / TEXT_FEATURES_FILE, object=np.ones((2, 3), np.float32), pcb=np.ones(1))
    seal(bundle, read_manifest(bundle))
    with pytest.raises(BundleError, match="object"):
        open_bundle(bundle).text_features()


def test_pickled_text_features_are_refused(bundle: Path) -> None:
    np.savez(bundle / TEXT_FEATURES_FILE, object=np.array([{}, {}], dtype=object))
    seal(bundle, read_manifest(bundle))
    with pytest.raises(BundleError, match="no readable features"):
        open_bundle(bundle).text_features()


def test_sealing_lists_every_file(bundle: Path) -> None:
    (bundle / "extra.txt").write_text("x")
    manifest = seal(bundle, msgspec.structs.replace(read_manifest(bundle), name="renamed"))
    assert manifest.files["extra.txt"].bytes == 1
    assert open_bundle(bundle).manifest == manifest


def test_publishing_replaces_a_bundle_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    publish(Path(shutil.copytree(bundle, tmp_path / "first")), target)
    publish(Path(shutil.copytree(bundle, tmp_path / "second")), target)
    open_bundle(target)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "published"}
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(BundleError, match="not a bundle"):
        publish(bundle, precious)
    assert (precious / "thesis.tex").exists()


def test_a_bundle_exists_at_all_times_while_it_is_replaced(bundle: Path, tmp_path: Path) -> None:
    """A process that opens the manifest in a loop never fails while bundles are published."""
    target = tmp_path / "published"
    publish(Path(shutil.copytree(bundle, tmp_path / "first")), target)
    loop = f"while True: open({str(target / 'manifest.json')!r}).close()"
    reader = subprocess.Popen([sys.executable, "-c", loop], stderr=subprocess.DEVNULL)
    try:
        for number in range(20):
            publish(Path(shutil.copytree(bundle, tmp_path / f"new{number}")), target)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "published"}


def test_publishing_where_the_file_system_cannot_swap(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bundle_module, "RENAME_EXCHANGE", 1 << 20)  # a flag that no kernel supports
    target = tmp_path / "published"
    publish(Path(shutil.copytree(bundle, tmp_path / "first")), target)
    second = Path(shutil.copytree(bundle, tmp_path / "second"))
    inode = (second / "manifest.json").stat().st_ino
    publish(second, target)
    assert (target / "manifest.json").stat().st_ino == inode
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "published"}


def test_the_default_bundle_is_in_the_package() -> None:
    assert default_bundle().parts[-2:] == ("lite", "bundle")
