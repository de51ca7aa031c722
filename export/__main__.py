"""``agpt export``: research checkpoints to one bundle for the edge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..runtime.errors import AgptError, ConfigError
from .options import LLM_PRECISIONS, RESIZE_MODES, ExportOptions, parse_size

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def export(
    imagebind: Annotated[Path, typer.Option(help="imagebind_huge.pth, or a tower saved in its key names.")],
    vicuna: Annotated[Path, typer.Option(help="Hugging Face folder of the language model (Vicuna v0).")],
    pandagpt: Annotated[Path, typer.Option(help="PandaGPT's pytorch_model.pt (LoRA and llama_proj).")],
    anomalygpt: Annotated[Path, typer.Option(help="AnomalyGPT's pytorch_model.pt (decoder, learner).")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write; a bundle that is there is replaced.")],
    text_features: Annotated[
        Path | None,
        typer.Option(
            help="npz: class name to [2, E] (normal, abnormal); computed with ImageBind's text tower when left out."
        ),
    ] = None,
    about: Annotated[Path | None, typer.Option(help="model.json: name, notices, region levels.")] = None,
    precision: Annotated[str, typer.Option(help="Of the networks: fp32.")] = "fp32",
    llm_quant: Annotated[
        str, typer.Option(help=f"Of the language model: {', '.join(LLM_PRECISIONS)}.")
    ] = "f16",
    engine: Annotated[str, typer.Option(help="Comma-separated: onnx.")] = "onnx",
    classes: Annotated[
        str,
        typer.Option(help="Comma-separated class names, with the text tower any; all known when left out."),
    ] = "",
    resize: Annotated[
        str, typer.Option(help=f"How frames become square: {' or '.join(RESIZE_MODES)}.")
    ] = "crop",
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse at once what would take more memory, for example 8G.")
    ] = None,
    allow_parity_failure: Annotated[
        bool, typer.Option("--allow-parity-failure", help="Publish, marked, what fails the comparison.")
    ] = False,
) -> None:
    """Turn checkpoints into a bundle, compare it with them, and publish it whole or not at all."""
    options = ExportOptions(
        imagebind=imagebind,
        vicuna=vicuna,
        pandagpt=pandagpt,
        anomalygpt=anomalygpt,
        text_features=text_features,
        out=out,
        about=about,
        precision=precision,
        llm_quant=llm_quant,
        engines=split(engine),
        classes=split(classes),
        resize=resize,  # type: ignore[arg-type]  # checked by ExportOptions
        allow_parity_failure=allow_parity_failure,
        max_memory=parse_size(max_memory) if max_memory else None,
    )
    try:
        from .pipeline import export_bundle, print_report
    except ImportError as error:
        raise ConfigError(
            f"agpt export needs a package that is not installed ({error.name}): "
            "pip install 'anomalygpt-edge[export]'"
        ) from error
    console = Console()
    print_report(export_bundle(options, console), console)


def split(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def export_command(arguments: list[str]) -> None:
    """Run ``agpt export`` with these arguments.

    Raises:
        AgptError: a mistake of the user, in one sentence.
    """
    app(args=arguments, prog_name="agpt export", standalone_mode=False)


def main() -> None:
    """``python -m anomalygpt_edge.export``: a user's mistake is one sentence and exit status 2."""
    try:
        app(prog_name="agpt export")
    except AgptError as error:
        print(f"agpt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
