"""Native resources: freed once, by their owner; use afterwards or in a forked process is an error."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from threadpoolctl import threadpool_info

import anomalygpt_edge as agpt
from anomalygpt_edge.runtime.bundles.bundle import default_bundle, read_manifest, seal
from anomalygpt_edge.runtime.vision import pipeline


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


USES: dict[str, Callable[[agpt.Inspector], object]] = {
    "inspect": lambda inspector: inspector.inspect(frame()),
    "ask": lambda inspector: inspector.ask(frame(), "Is it good?"),
    "dialogue": lambda inspector: inspector.dialogue(frame()).ask(),
    "parts": lambda inspector: inspector.parts(frame()),
    "make_bank": lambda inspector: inspector.make_bank([frame()]),
    "use": lambda inspector: inspector.use(None),
    "vision": lambda inspector: inspector.vision.encode_frame(frame(), inspector.product),
    "language": lambda inspector: inspector.language.session.tokenise("Is it good?"),
    "encoder": lambda inspector: inspector.vision.networks["encoder"].run(
        pixels=np.zeros((1, 3, 224, 224), np.float32)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close_raises_closed_error(tiny_bundle: Path, use: str) -> None:
    inspector = agpt.Inspector.open(tiny_bundle, threads=1)
    USES[use](inspector)
    inspector.close()
    inspector.close()
    with pytest.raises(agpt.ClosedError, match="is closed: open it again"):
        USES[use](inspector)


def test_a_dialogue_cannot_be_used_after_its_inspector_was_closed(tiny_bundle: Path) -> None:
    with agpt.Inspector.open(tiny_bundle, threads=1) as inspector:
        dialogue = inspector.dialogue(frame())
        dialogue.ask()
    with pytest.raises(agpt.ClosedError):
        dialogue.ask()


@pytest.mark.parametrize("first", [0, 1])
def test_two_inspectors_closed_in_any_order_leave_blas_as_it_was(tiny_bundle: Path, first: int) -> None:
    before = blas_threads()
    opened = [agpt.Inspector.open(tiny_bundle, threads=1) for _ in range(2)]
    assert blas_threads() == {1}
    opened[first].close()
    assert blas_threads() == {1}
    assert opened[1 - first].inspect(frame()).status is not agpt.Status.NO_RESULT
    opened[1 - first].close()
    assert blas_threads() == before


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    """The shipped bundle with the same word for yes and no; it is refused after its language model was loaded."""
    folder = tmp_path / "unusable"
    shutil.copytree(default_bundle(), folder)
    manifest = read_manifest(folder)
    words = msgspec.structs.replace(manifest.prompt, affirmative="Yes", negative="Yes", answers=None)
    seal(folder, msgspec.structs.replace(manifest, prompt=words))
    return folder


def test_a_failed_open_frees_everything(unusable: Path) -> None:
    before = blas_threads()
    for attempt in range(12):
        with pytest.raises(agpt.BundleError, match="same token"):
            agpt.Inspector.open(unusable, threads=1)
        if attempt == 3:  # by then the libraries' memory pools have grown
            reference = resident_megabytes()
    assert resident_megabytes() - reference < 25, "one language model is 7 MB"
    assert blas_threads() == before


def test_stages_that_fail_to_open_free_the_networks(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def refuse(_: object, networks: dict, __: int) -> None:
        opened.extend(networks.values())
        raise agpt.BundleError("the plans do not fit each other: build them again")

    monkeypatch.setattr(pipeline, "open_resident_stages", refuse)
    with pytest.raises(agpt.BundleError, match="do not fit each other"):
        agpt.Inspector.open(tiny_bundle, threads=1)
    assert len(opened) == 3
    for network in opened:
        with pytest.raises(agpt.ClosedError):
            network.run()


def test_a_failed_enrolment_at_opening_frees_everything(tiny_bundle: Path) -> None:
    before = blas_threads()
    with pytest.raises(agpt.ImageError):
        agpt.Inspector.open(tiny_bundle, threads=1, normals=[np.zeros((0, 0, 3), np.uint8)])
    assert blas_threads() == before


def test_calls_from_several_threads_run_one_after_the_other(tiny_bundle: Path) -> None:
    with agpt.Inspector.open(tiny_bundle, threads=1) as inspector:
        alone = [inspector.inspect(frame(seed)) for seed in range(4)]
        together: dict[int, agpt.Verdict] = {}

        def work(seed: int) -> None:
            for _ in range(3):
                together[seed] = inspector.inspect(frame(seed))
                inspector.dialogue(frame(seed)).ask()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, verdict in enumerate(alone):
        np.testing.assert_array_equal(together[seed].maps, verdict.maps)
        assert (together[seed].status, together[seed].sentence) == (verdict.status, verdict.sentence)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_use_in_a_forked_process_raises_closed_error(tiny_bundle: Path) -> None:
    with agpt.Inspector.open(tiny_bundle, threads=2) as inspector:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                words = []
                for use in USES.values():
                    try:
                        use(inspector)
                        words.append("it worked")
                    except agpt.ClosedError as error:
                        words.append(str(error))
                inspector.close()
                os.write(write, "\n".join(words).encode())
            finally:
                os._exit(0)
        os.close(write)
        words = b"".join(iter(lambda: os.read(read, 1 << 16), b"")).decode().splitlines()
        os.close(read)
        assert os.waitpid(child, 0)[1] == 0
        assert len(words) == len(USES)
        assert all("was opened by another process" in each for each in words), words
        assert inspector.inspect(frame()).status is not agpt.Status.NO_RESULT, (
            "the parent's inspector still works"
        )
