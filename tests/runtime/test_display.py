"""The live table on a terminal, and plain lines otherwise."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from anomalygpt_edge.runtime.cameras import Frame
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.outputs.display import LiveTable, PlainLines, open_display
from anomalygpt_edge.runtime.outputs.tally import Tally

SENTENCE = "Yes, there is an anomaly in the image, at the top left of the image."


def show(console: Console, num_parts: int = 3) -> str:
    display = open_display("agpt run: test", console)
    tally = Tally()
    for index in range(num_parts):
        frame = Frame(
            f"part-{index}", "test", np.zeros((2, 2, 3), np.uint8), product="gear", defects=("hole",)
        )
        verdict = Verdict(status=Status.FAIL, reason="answered Yes", p_anomaly=0.987, sentence=SENTENCE)
        tally.add(frame, verdict, 10.0 + index)
        display.put(frame, verdict, 10.0 + index, tally)
    display.close()
    return console.file.getvalue()


def test_a_terminal_gets_a_table():
    console = Console(file=io.StringIO(), force_terminal=True, width=150, height=30)
    assert isinstance(open_display("", console), LiveTable)
    shown = show(console)
    for word in ("part-2", "gear", "FAIL", "0.987", SENTENCE, "12.0", "caught", "3 of 3 defective parts"):
        assert word in shown
    assert "p50 11.0 ms" in shown


def test_the_table_fits_a_small_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12)
    shown = show(console, 40)
    assert "part-39" in shown
    last = shown.rsplit("agpt run: test", 1)[1]
    assert len(last.splitlines()) <= 12


def test_a_pipe_gets_one_complete_line_per_part():
    console = Console(file=io.StringIO(), width=40)
    assert isinstance(open_display("", console), PlainLines)
    lines = show(console).splitlines()[2:]
    assert len(lines) == 3
    assert all(SENTENCE in line and "FAIL" in line and "p=0.987" in line for line in lines)
    assert "[caught]" in lines[0]


def test_the_operator_sees_how_far_it_is_and_what_went_wrong(capsys):
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=150, height=30)
        display = open_display("agpt run: test", console, total=82)
        verdict = Verdict(status=Status.PASS, reason="answered No", p_anomaly=0.1, sentence="No.")
        frame, tally = Frame("a", "test", np.zeros((2, 2, 3), np.uint8)), Tally()
        for _ in range(54):
            tally.add(frame, verdict, 10.0)
        display.put(frame, verdict, 10.0, tally)
        display.say("part [a] has no overlay: disk full")
        display.close()
        shown = console.file.getvalue()
        assert "54 of 82" in shown
        assert "part [a] has no overlay: disk full" in (shown if terminal else capsys.readouterr().err)


def put(console: Console, *verdicts: Verdict) -> str:
    display = open_display("agpt run: test", console)
    tally = Tally()
    for verdict in verdicts:
        frame = Frame("a", "test", np.zeros((2, 2, 3), np.uint8))
        tally.add(frame, verdict, 10.0)
        display.put(frame, verdict, 10.0, tally)
    display.close()
    return console.file.getvalue()


def verdict_of(score: float, limit: float | None, unseen: float | None = None) -> Verdict:
    return Verdict(status=Status.PASS, reason="", sentence="No.", score=score, limit=limit, unseen=unseen)


def test_the_map_score_stands_beside_its_limit_and_is_red_over_it() -> None:
    shown = [
        put(Console(file=io.StringIO(), force_terminal=True, width=150, height=30), verdict_of(score, limit))
        for score, limit in ((1.5, 2.0), (2.5, 2.0), (0.25, None))
    ]
    assert "1.50/2.00" in shown[0]
    assert "\x1b[1;31m2.50/2.00" in shown[1]
    assert "\x1b[1;31m" not in shown[0] + shown[2]
    assert "map 1 = good parts, red over the limit" in shown[0]
    assert "0.250 raw" in shown[2]
    assert "red over the limit" not in shown[2]
    lines = put(Console(file=io.StringIO()), verdict_of(1.5, 2.0), verdict_of(0.25, None)).splitlines()
    assert "map=1.50/2.00" in lines[1]
    assert "map=0.250 raw" in lines[2]


def test_what_is_not_inspected_is_said(capsys) -> None:
    verdicts = [verdict_of(1, 2, 0.25), verdict_of(1, 2, 0.25), verdict_of(1, 2, 0.0), verdict_of(1, 2, 0.95)]
    assert len(put(Console(file=io.StringIO()), *verdicts).splitlines()) == 1 + len(verdicts)
    assert capsys.readouterr().err.splitlines() == [
        "agpt: 25 % of the frame is not inspected",
        "agpt: 95 % of the frame is not inspected",
    ]
    table = put(Console(file=io.StringIO(), force_terminal=True, width=150, height=30), *verdicts[:2])
    assert "25 % of the frame is not inspected" in table


def test_the_progress_of_a_long_part_is_shown_on_a_terminal_until_its_verdict() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=150, height=30)
        display = open_display("agpt run: test", console)
        display.progress("board [7]", "encode", 16, 138)
        assert ("part board [7]: encode 16 of 138 views" in console.file.getvalue()) is terminal
        before = len(console.file.getvalue())
        display.put(Frame("board [7]", "test", None), verdict_of(1, 2), 10.0, Tally())
        display.close()
        assert "of 138 views" not in console.file.getvalue()[before:]


def test_markup_in_an_id_is_only_text():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    display = open_display("title", console)
    verdict = Verdict(status=Status.NO_RESULT, reason="[/red] broken [bold]")
    tally = Tally()
    tally.add(Frame("[red]x", "test", None), verdict, 1.0)
    display.put(Frame("[red]x", "test", None), verdict, 1.0, tally)
    display.close()
    assert "[red]x" in console.file.getvalue()
    assert "[/red] broken [bold]" in console.file.getvalue()
    assert "–" in console.file.getvalue()
