"""What each option means, in a line: the same words in all commands."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["with_help"]

OPTIONS = {
    "again": "Make models also where there is one.",
    "alias": "The alias.",
    "batch": "A batch size; may be given several times.",
    "checkpoint": "A checkpoint, for PyTorch's turn.",
    "compiled": "Let what torch.compile makes of the module take its turn, too.",
    "core": "auto, dynamo, trace, script or torchscript.",
    "datamodule": "package.module:Class or file.py:Class; its batches show what forward takes.",
    "example": "A file with what forward takes: .pt, .npy or .npz.",
    "experiment": "Name of the MLflow experiment.",
    "host": "Where the server listens.",
    "json": "Print JSON, for programs.",
    "module": "package.module:Class or file.py:Class; its arguments come from the checkpoint.",
    "opset": "ONNX opset version; default: torch's own.",
    "output": "Where to write; default: beside what is read.",
    "pin": "No training may move the alias from then on.",
    "port": "The port.",
    "precision": "fp32, fp16, bf16 or fp64; default: the checkpoint's own.",
    "provider": "An execution provider of ONNX Runtime; may be given several times.",
    "register": "Name in the model registry.",
    "seconds": "How long to measure, in seconds.",
    "set": "name=value: an argument of the module; may be given several times.",
    "shape": "name=8x3x32x32:dtype, or 8x3x32x32, of an input; may be given several times.",
    "size": "name=128: a symbolic size besides the batch; may be given several times.",
    "target": "Name of the submodule or method that is exported.",
    "tracking_uri": "Address of MLflow; default: MLFLOW_TRACKING_URI.",
    "trust_checkpoint": "Execute what the checkpoint says; only for files of your own.",
    "variant": "fp16, int8 or int8-static: a smaller child of each model.",
    "workers": "How many processes make the models of a folder.",
}
"""By the names of the parameters."""


def with_help(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command's parameters the texts that its help shows.

    Args:
        command: Its arguments are annotated with a sentence, its options are known by name.
    """
    import typer

    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if get_origin(kind) is Annotated:
            plain, text = get_args(kind)[:2]
            if not isinstance(text, str):  # it has been done before
                continue
            needed = parameter.default is parameter.empty
            shown: Any = typer.Argument(help=text) if needed else typer.Option(help=text)
        elif name in OPTIONS:
            plain, shown = kind, typer.Option(help=OPTIONS[name])
        else:
            continue
        command.__annotations__[name] = Annotated[plain, shown]
    return command
