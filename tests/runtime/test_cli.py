"""The command as a user types it: what it does, and one sentence with status 2 for every mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalygpt_edge.export.options import ENGINES, LLM_PRECISIONS, PRECISIONS, RESIZE_MODES
from anomalygpt_edge.runtime.cameras import Camera
from anomalygpt_edge.runtime.cli import main as cli

IN_BATCH = "import sys; from anomalygpt_edge.runtime.cli.main import main; main()"


def agpt(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", IN_BATCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


UNSEEN = "agpt: 25 % of the frame is not inspected\n"  # of pictures of 80 x 60 pixels


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The command in this process: status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with two pictures and one broken file."""
    folder = tmp_path / "parts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "c.png"):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (60, 80, 3), np.uint8))
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    return folder


def is_one_sentence(status: int, out: str, err: str) -> bool:
    return status == 2 and out == "" and err.startswith("agpt: ") and err.count("\n") == 1


def test_help_answers_at_once():
    agpt("--help")
    started = time.perf_counter()
    result = agpt("--help")
    seconds = time.perf_counter() - started
    assert result.returncode == 0
    for command in ("run", "enroll", "ask", "eval", "export", "verify", "doctor"):
        assert f"  {command} " in result.stdout
    assert seconds < 0.5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from anomalygpt_edge.runtime.cli.main import main\n"
        "sys.argv = ['agpt', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'cv2', 'onnxruntime', 'llama_cpp', 'torch', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_mistakes_on_the_command_line(call):
    for arguments, said in [
        (["nonsense"], "No such command"),
        (["run", "--nonsense"], "No such option"),
        (["ask"], "needs an image"),
        (["ask", "a.png", "is", "it", "broken?"], "put the question in quotes"),
        (["run", "parts/"], "did you mean --source parts/?"),
        (["enroll", "--name", "x", "--out", "r.toml", "--normal", "a", "b"], "did you mean --normal b?"),
        (["verify", "a", "b"], "agpt verify --help"),
        (["trace"], "Missing argument"),
        (
            ["enroll", "--name", "x", "--out", "r.toml", "--normal", "a", "--resize", "fit"],
            "--resize must be crop or stretch",
        ),
        (
            ["enroll", "--name", "x", "--out", "r.toml", "--normal", "a", "--without-verdict", "pass"],
            "--without-verdict must be no_result or map, not 'pass'",
        ),
        (["run", "--source", ""], "the source is empty"),
        (["run", "--normal", ""], "path on the command line is empty"),
        (["verify", ""], "path on the command line is empty"),
        (["ask", "a.png", "\udcff?"], "is not UTF-8 text"),
        (["enroll", "--name", "\udcff", "--out", "r.toml", "--normal", "a"], "is not UTF-8 text"),
        (["run", "--threads", "0"], "threads"),
        (["run", "--overlays", "some"], "all, reject, none"),
        (["eval", "b", "f", "--shots", "x"], "--shots"),
        (["run", "--recipe", "r.toml", "--normal", "n.png"], "leave out --normal"),
    ]:
        result = call(*arguments)
        assert is_one_sentence(*result), (arguments, result)
        assert said in result[2]


def test_absent_sources_bundles_and_images(call, tmp_path, parts):
    empty = tmp_path / "empty"
    empty.mkdir()
    sixteen_bit = tmp_path / "deep.png"
    cv2.imwrite(str(sixteen_bit), np.zeros((8, 8), np.uint16))
    (tmp_path / "zero.png").write_bytes(b"")
    for arguments, said in [
        (["run", "--source", tmp_path / "absent"], "no source"),
        (["run", "--source", empty], "contains no image"),
        (["run", "--source", parts / "b.png"], "b.png"),
        (["run", "--source", sixteen_bit], "8 bits"),
        (["run", "--source", tmp_path / "zero.png"], "zero.png"),
        (["run", "--source", parts, "--bundle", empty], "manifest.json"),
        (["run", "--source", parts, "--bundle", tmp_path / "absent"], "no bundle at"),
        (["run", "--source", parts, "--normal", tmp_path / "absent.png"], "absent.png"),
        (["ask", parts / "b.png", "Is it broken?"], "b.png"),
        (["ask", parts / "a.png", " "], "question is empty"),
        (["eval", tmp_path / "absent", parts / "a.png"], "not a folder"),
        (["eval", tmp_path / "absent", empty], "neither layout"),
        (["enroll", "--name", "x", "--normal", empty, "--out", tmp_path / "r.toml"], "contains no image"),
        (
            ["enroll", "--name", "x", "--out", "x.toml", "--normal", parts / "a.png", "--tiles", "3y"],
            "like 3x3",
        ),
        (
            ["enroll", "--name", "x", "--out", "x.toml", "--normal", parts / "a.png", "--region", "a=1,2"],
            "NAME=x,y,width,height",
        ),
        (["eval", parts, parts, "--tiles", "0x0"], "--tiles"),
        (["verify", tmp_path / "absent"], "no bundle at"),
    ]:
        result = call(*arguments)
        assert is_one_sentence(*result), (arguments, result)
        assert said in result[2]


@pytest.mark.skipif(sys.platform != "linux", reason="V4L2")
def test_a_camera_that_is_not_there(call):
    result = call("run", "--source", "93")
    assert is_one_sentence(*result)
    assert "camera 93 was not found" in result[2]


def test_a_folder_is_inspected_and_the_broken_file_gets_its_record(tiny_bundle, parts, tmp_path):
    out = tmp_path / "out"
    result = agpt("run", "--source", parts, "--bundle", tiny_bundle, "--out", out, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr == UNSEEN
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["part_id"] for record in records] == ["a", "b", "c"]
    assert records[1]["status"] == "NO_RESULT"
    assert records[0]["status"] in ("PASS", "FAIL")
    assert records[0]["sentence"]
    assert len(records[0]["bundle_sha256"]) == 64
    assert sorted(path.name for path in (out / "overlays").iterdir()) == [
        "00001_a.png",
        "00002_b.png",
        "00003_c.png",
    ]
    assert "3 parts" in result.stdout
    assert "p50" in result.stdout


def test_a_run_without_one_verdict_fails(call, tiny_bundle, parts, tmp_path):
    """A script that starts a run must not take a line that judged nothing for one that went well."""
    for path in parts.iterdir():
        path.write_bytes(b"no image")
    out = tmp_path / "out"
    status, printed, complaint = call("run", "--source", parts, "--bundle", tiny_bundle, "--out", out)
    assert status == 2
    assert "3 parts: 0 PASS, 0 FAIL, 3 NO_RESULT" in printed
    assert complaint == f"agpt: all 3 parts are NO_RESULT: the reasons are in {out}\n"
    assert len((out / "records.jsonl").read_text().splitlines()) == 3


def test_enroll_then_run_ask_and_verify(call, tiny_bundle, parts, tmp_path):
    (parts / "b.png").unlink()
    recipe = tmp_path / "recipe.toml"
    bundle = ("--bundle", tiny_bundle, "--threads", 1)
    enrolment = ("enroll", "--name", "gear", "--normal", parts, "--out", recipe, *bundle)
    status, _, complaint = call(*enrolment)
    assert status == 2
    assert not recipe.exists()
    assert "25 % of a frame of 80 x 60 pixels" in complaint
    assert "--tiles 1x2 or --resize stretch" in complaint
    assert "--resize crop to accept it" in complaint
    status, said, _ = call(*enrolment, "--resize", "crop")
    assert status == 0
    assert "not inspected: 25 % of the frame, outside the centre square" in said
    out = tmp_path / "out"
    assert (
        call("run", "--source", parts, "--recipe", recipe, "--out", out, "--overlays", "none", *bundle)[0]
        == 0
    )
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["recipe"] for record in records] == ["gear", "gear"]
    assert [record["unseen"] for record in records] == [0.25, 0.25]
    assert all(record["peak"] < 1e-3 for record in records), "a part is no distance from itself"
    assert not (out / "overlays").exists()
    status, said, _ = call("ask", parts / "a.png", "Is there any anomaly?", "--recipe", recipe, *bundle)
    assert status == 0
    assert said.strip()
    status, said, _ = call("verify", tiny_bundle)
    assert status == 0
    assert "encoder.onnx" in said


@pytest.mark.parametrize(
    ("options", "dtype", "rows", "exact"),
    [
        (["--storage", "float16", "--resize", "stretch"], np.float16, 512, 1e-3),
        (["--storage", "int8", "--resize", "crop"], np.int8, 512, 1e-2),
        (["--max-patches", 100, "--resize", "crop"], np.float32, 100, None),
        (["--storage", "int8", "--max-patches", 64, "--tiles", "2x2"], np.int8, 64, None),
        (["--tiles", "2x2"], np.float32, 4 * 512, 1e-3),
        (["--region", "left=0,0,20,30", "--region", "right=25,5,20,20,15"], np.float32, 512, 1e-3),
    ],
)
def test_enroll_stores_the_bank_that_is_asked_for(
    call, tiny_bundle, parts, tmp_path, options, dtype, rows, exact
):
    (parts / "b.png").unlink()
    recipe = tmp_path / "recipe.toml"
    bundle = ("--bundle", tiny_bundle, "--threads", 1)
    status, _, error = call("enroll", "--name", "gear", "--normal", parts, "--out", recipe, *options, *bundle)
    assert status == 0, error
    with np.load(tmp_path / "recipe.bank.npz") as bank:
        assert bank["features"].dtype == dtype
        assert bank["features"].shape[1:3] == (4, rows)
        assert ("scales" in bank) == (dtype == np.int8)
        assert ("origins" in bank) == ("--max-patches" in options)
    out = tmp_path / "out"
    assert call("run", "--source", parts, "--recipe", recipe, "--out", out, *bundle)[0] == 0
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {record["status"] for record in records} == {"FAIL"}
    if exact:
        assert all(record["peak"] < exact for record in records), "a part is no distance from itself"
    assert len(list((out / "overlays").iterdir())) == 2


def test_the_demo_line_says_what_was_caught(call, tiny_bundle, tmp_path):
    out = tmp_path / "out"
    status, said, err = call(
        "run", "--source", "demo", "--parts", 3, "--bundle", tiny_bundle, "--out", out, "--overlays", "reject"
    )
    assert status == 0, err
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert all(record["recipe"] == record["product"] for record in records)
    num_defective = sum(bool(record["defects"]) for record in records)
    assert f"of {num_defective} defective parts caught" in said


def test_an_altered_bundle_and_an_unknown_class(call, tiny_bundle, parts, tmp_path):
    result = call("run", "--source", parts, "--bundle", tiny_bundle, "--class", "spaceship")
    assert is_one_sentence(*result)
    assert "unknown class name 'spaceship'" in result[2]
    altered = tmp_path / "altered"
    shutil.copytree(tiny_bundle, altered)
    data = bytearray((altered / "encoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (altered / "encoder.onnx").write_bytes(data)
    for command in (["verify", altered], ["run", "--source", parts, "--bundle", altered]):
        result = call(*command)
        assert is_one_sentence(*result)
        assert "encoder.onnx was altered" in result[2]


def test_eval_prints_a_table_and_writes_json(call, tiny_bundle, tmp_path):
    rng = np.random.default_rng(1)
    root = tmp_path / "set" / "object"
    for name in ("train/good/0.png", "test/good/0.png", "test/dent/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), rng.integers(0, 256, (64, 64, 3), np.uint8))
    (root / "ground_truth" / "dent").mkdir(parents=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[:20, :20] = 255
    cv2.imwrite(str(root / "ground_truth" / "dent" / "0_mask.png"), mask)
    status, said, err = call(
        "eval", tiny_bundle, tmp_path / "set", "--shots", "0,1", "--json", tmp_path / "figures.json"
    )
    assert status == 0, err
    assert "object" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["categories"]["object"]) == {"0", "1"}
    assert 0 <= figures["mean"]["1"]["pixel_auroc"] <= 1


@pytest.mark.parametrize("command", ["run", "verify"])
def test_output_into_a_closed_pipe_is_no_success(tiny_bundle, parts, tmp_path, command):
    run = ["--source", str(parts), "--bundle", str(tiny_bundle), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_BATCH, command, *(run if command == "run" else [str(tiny_bundle)])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    complaint = process.stderr.read()
    assert complaint == "agpt: the reader of the output has closed it: the rest of the output is lost\n"
    assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_into_a_full_disk_is_said(tiny_bundle):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", IN_BATCH, "verify", str(tiny_bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert result.stderr.startswith("agpt: a file could not be read or written (No space left on device)")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_its_summary_and_is_no_success(tiny_bundle, tmp_path, number):
    out = tmp_path / "out"
    arguments = ["run", "--parts", "100000", "--bundle", tiny_bundle, "--out", out, "--overlays", "none"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_BATCH, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    title = process.stdout.readline()
    first = process.stdout.readline()
    process.send_signal(number)
    printed, complaint = process.communicate(timeout=60)
    assert "agpt run" in title
    assert "    1 of 100000  " in first
    num_parts = len((out / "records.jsonl").read_text().splitlines())
    assert f"{num_parts} parts: " in printed
    assert complaint == f"{UNSEEN}agpt: stopped by {number.name} after {num_parts} parts\n"
    assert process.returncode == 128 + number


def test_help_cuts_nothing_and_has_a_short_option(call):
    for arguments in (["-h"], ["--help"], []):
        status, said, _ = call(*arguments)
        assert status == 0
        assert "..." not in said.replace("[ARGS]...", "")
        assert "or check a set of checkpoints." in " ".join(said.split())
        assert "130 after Ctrl-C" in " ".join(said.split())
    for command in ("run", "enroll", "ask", "trace", "eval", "export", "verify", "doctor", "schema"):
        status, said, _ = call(command, "-h")
        assert status == 0
        assert "-h, --help" in said


def test_the_schema_is_the_published_one(call):
    status, said, _ = call("schema")
    assert status == 0
    assert said == (Path(__file__).parents[2] / "docs" / "record.schema.json").read_text()


def test_the_export_commands_help_names_every_choice(call):
    said = " ".join(call("export", "--help")[1].split())
    for choices in (ENGINES, PRECISIONS, LLM_PRECISIONS, RESIZE_MODES):
        assert all(choice in said for choice in choices)


def test_a_fault_of_the_program_is_not_disguised(monkeypatch, capsys):
    def fault(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_terminal_of_few_letters_is_no_crash(parts):
    result = subprocess.run(
        [sys.executable, "-c", IN_BATCH, "run", "--source", str(parts / "absent–")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith(b"agpt: there is no source")


def test_doctor_names_what_is_there_and_how_to_get_the_rest(call, monkeypatch, tiny_bundle, tmp_path):
    monkeypatch.setattr("anomalygpt_edge.runtime.station.doctor.default_bundle", lambda: tiny_bundle)
    status, said, _ = call("doctor")
    assert status == 0
    assert "onnxruntime" in said
    assert "shipped bundle" in said
    monkeypatch.setattr("anomalygpt_edge.runtime.station.doctor.default_bundle", lambda: tmp_path / "absent")
    status, said, _ = call("doctor")
    assert status == 1
    assert "MISS" in said


def test_a_dialogue_reads_a_question_a_line(call, tiny_bundle, parts, monkeypatch):
    lines = ["Is there any anomaly in the image?\n", "\n", "too long " * 60 + "\n", *["And now?\n"] * 30]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    status, said, complaint = call("ask", parts / "a.png", "--bundle", tiny_bundle)
    assert status == 0
    answers = said.splitlines()
    assert answers[0] == "Yes, at the top left."
    assert complaint.count("\n") == 1, "the long question is refused, the dialogue goes on"
    assert "ask a shorter question" in complaint
    assert len([line for line in answers if not line.startswith("(the context is full")]) == 31
    assert any("questions were dropped" in line for line in answers)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("farewell", ["quit", " EXIT "])
def test_a_dialogue_at_a_terminal_lists_questions_and_can_be_left(
    call, tiny_bundle, parts, monkeypatch, farewell
):
    monkeypatch.setattr(sys, "stdin", Terminal(f"And now?\n{farewell}\nAnd then?\n"))
    status, said, _ = call("ask", parts / "a.png", "--bundle", tiny_bundle)
    assert status == 0
    assert said.count("> ") == 2, "nothing is read after the farewell"
    assert "  Is there any anomaly in the image?\n" in said


def test_questions_that_are_no_text_are_refused_and_the_dialogue_goes_on(tiny_bundle, parts):
    result = subprocess.run(
        [sys.executable, "-c", IN_BATCH, "ask", str(parts / "a.png"), "--bundle", str(tiny_bundle)],
        input=b"\xef\xbb\xbfIs it broken?\n\xff\xfe?\nIs there any anomaly in the image?\n",
        capture_output=True,
    )
    assert result.returncode == 0
    assert result.stdout.count(b"Yes, at the top left.") == 2
    assert result.stderr == b"agpt: the question is not UTF-8 text: set the terminal or the file to UTF-8\n"


def test_a_dialogue_without_an_input_is_an_error(call, parts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    result = call("ask", parts / "a.png")
    assert is_one_sentence(*result)
    assert "no question can be read" in result[2]


def test_the_questions_of_a_bundle_are_listed(call, tiny_bundle, tmp_path):
    assert (
        call("ask", "--list-questions", "--bundle", tiny_bundle)[1] == "Is there any anomaly in the image?\n"
    )
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["questions"] = ["Where is it?", "Is there any anomaly in the image?"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = call("ask", "--list-questions", "--bundle", folder)[1]
    assert said.splitlines() == ["Is there any anomaly in the image?", "Where is it?"]


def test_a_system_error_without_a_file_is_one_sentence(call, monkeypatch):
    def fail(**_: object) -> None:
        raise OSError("the bus is gone")

    monkeypatch.setattr(cli, "app", fail)
    status, out, err = call("doctor")
    assert is_one_sentence(status, out, err)
    assert "None" not in err
    assert "the bus is gone" in err


def test_a_source_that_ends_before_its_first_part_is_an_error(call, tiny_bundle, monkeypatch, tmp_path):
    class Empty(Camera):
        name = "empty"

        def frames(self):
            return iter(())

        def close(self):
            pass

    monkeypatch.setattr("anomalygpt_edge.runtime.station.run.open_camera", lambda *_, **__: Empty())
    status, _, err = call("run", "--source", "x", "--bundle", tiny_bundle)
    assert status == 2
    assert err == "agpt: nothing was inspected: x delivered no frame; check the source\n"


def test_a_run_says_what_it_leaves_out_and_how_far_it_is(call, tiny_bundle, parts, tmp_path):
    (parts / "._a.png").write_bytes(b"")
    (parts / "x.gif").write_bytes(b"")
    out = parts / "out"
    for left_out in (
        "2 files left out: 1 GIF, 1 hidden",
        "6 files left out: 4 written by a run, 1 GIF, 1 hidden",
    ):
        status, said, err = call("run", "--source", parts, "--bundle", tiny_bundle, "--out", out)
        assert status == 0
        assert "    3 of 3  " in said
        assert err == f"agpt: {parts}: {left_out}\n{UNSEEN}"
