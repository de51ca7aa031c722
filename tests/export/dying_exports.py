"""``agpt export`` in processes that die: run by test_interruptions.py.

    python dying_exports.py BUNDLE_WITH_GRAPHS STAGE,… SIGNAL EXPORT_ARGUMENTS…

For each stage a process is forked that exports, and is sent the signal when the stage has half written its files (or,
for one that writes none, when it begins). The last process is left alone. Each goes on from what the one before left.
Graphs are copied from a bundle instead of being traced. Prints a JSON list of [stage, wait status, standard error].
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from anomalygpt_edge.export import pipeline, resume
from anomalygpt_edge.runtime.bundles.bundle import Component, open_bundle
from anomalygpt_edge.runtime.cli import main as cli

torch.set_num_threads(1)


def main() -> None:
    graphs, stages, signal_name, *arguments = sys.argv[1:]
    pipeline.export_networks = copy_graphs(Path(graphs))
    deaths = []
    for stage in [*stages.split(","), None]:
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(errors.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if stage:
                    die_in(stage, signal.Signals[signal_name])
                os._exit(export(arguments))  # without the destructors of threads that a fork does not have
            _, status = os.waitpid(child, 0)
            errors.seek(0)
            deaths.append([stage, status, errors.read()])
    print(json.dumps(deaths))


def export(arguments: list[str]) -> int:
    """The command's exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    sys.argv = ["agpt", "export", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.stderr.flush()


def die_in(stage: str, how: signal.Signals) -> None:
    """Patch the pipeline so that this process gets the signal in the middle of a stage."""

    def die(*_arguments: object) -> None:
        os.kill(os.getpid(), how)

    def halve_and_die(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        die()

    plain_run = resume.FinishedStages.run

    def run(self: resume.FinishedStages, name: str, *details: object) -> object:
        if name == stage and name not in self.stages:
            resume.flush = halve_and_die
        return plain_run(self, name, *details)

    plain_step = pipeline.Steps.step

    @contextmanager
    def step(self: pipeline.Steps, description: str, total: int = 1) -> Iterator[pipeline.Step]:
        with plain_step(self, description, total) as begun:
            if description == stage:
                die()
            yield begun

    resume.FinishedStages.run, pipeline.Steps.step = run, step
    if stage == "publish":
        pipeline.publish = die


def copy_graphs(bundle: Path):
    """In place of tracing."""

    def copy(reference: object, folder: Path, step: object) -> dict[str, Component]:
        components = open_bundle(bundle).manifest.components
        graphs = {name: part for name, part in components.items() if name != "language_model"}
        for part in graphs.values():
            shutil.copy(bundle / part.file, folder)
        return graphs

    return copy


if __name__ == "__main__":
    main()
