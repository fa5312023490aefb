"""Models made from other programs' files, and for other programs: import and export."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.architectures import NetworkPlan, build_network, plan_network
from wsi_pipeline.models.archive import open_archive
from wsi_pipeline.models.card import (
    ARCHIVES,
    OURS,
    TIMM,
    ModelCard,
    NetworkOutput,
    is_architecture,
    with_version,
    write_card,
)
from wsi_pipeline.models.checkpoint import load_model, save_model, sha256
from wsi_pipeline.models.model_folder import file_kind, refuse_unsafe
from wsi_pipeline.models.output import find_output, first_line

Kind = Literal["logit", "probability"]
Colour = tuple[float, float, float]
COMPARED = 3
"""Patches that an exported model is compared with the original on."""
LARGEST_DIFFERENCE = 1e-4
"""Between their probabilities."""


def import_model(
    file: str | Path,
    folder: str | Path,
    *,
    mpp: float,
    architecture: str | None = None,
    arguments: dict[str, Any] | None = None,
    name: str = "",
    patch_px: int | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    output: Kind = "logit",
    tumour_class: int | None = None,
) -> ModelCard:
    """Make a model folder of a file of another program, tried on random patches first.

    Parameters
    ----------
    file : path-like
        ``.pt2`` (torch.export), ``.onnx``, or ``.safetensors`` with all weights of `architecture`.
    folder : path-like
        Missing or empty.
    mpp : float
        Micrometres per px of the patches that the network was trained on.
    architecture : str, optional
        Of a ``.safetensors`` file, as for `build_network`.
    arguments : dict, optional
        Keyword arguments of its class or function.
    name : str
        What the model is called; "" is the name of its folder.
    patch_px : int, optional
        Side of its patches; unless given, that which an archive has fixed.
    mean, std : tuple of float, optional
        See `ModelCard`; unless given, timm's of its networks, ImageNet's of others.
    output : {"logit", "probability"}
        What the network returns.
    tumour_class : int, optional
        The column that is tumour, of a network with classes; unless given, column 1 of two.

    Returns
    -------
    ModelCard

    Raises
    ------
    ModelError
        If the file is of no such kind, could run code when it is loaded, does not fit the
        architecture, or the network does not take the patches or returns something else.
    """
    file, folder = Path(file), Path(folder)
    reading = _Reading(output, tumour_class)
    if (kind := _importable(file)) in ARCHIVES:
        network, plan, patch_px = _of_archive(file, kind, architecture, patch_px, reading)
    else:
        network, plan = _of_weights(file, architecture, arguments, patch_px, reading)
    card = ModelCard(
        architecture=plan.architecture,
        arguments=plan.arguments,
        name=name,
        mean=mean or plan.mean,
        std=std or plan.std,
        patch_px=patch_px,  # type: ignore[arg-type]  # refused where it is None
        mpp=mpp,
        output=plan.output,
        training={"imported_from": file.name},
    )
    with _new_folder(folder) as part:
        if card.archived:
            _save_archive(part, file, card)
        else:
            save_model(part, network, _with_library(card))
        _, card = load_model(part)
    return card


def export_model(folder: str | Path, out: str | Path, kind: Literal["pt2", "onnx"]) -> ModelCard:
    """Write a model as an archive, for other programs or for machines without its network's code.

    The archive takes any number of normalised patches of the card's size and returns logits (N,).
    Its card says the same as the model's otherwise.

    Parameters
    ----------
    folder : path-like
    out : path-like
        Missing or empty.
    kind : {"pt2", "onnx"}

    Raises
    ------
    ModelError
        If the model cannot be loaded or exported, a library is missing, or the archive's
        probabilities are not the model's.
    """
    folder, out = Path(folder), Path(out)
    if kind not in ARCHIVES:
        raise ModelError(f"format {kind!r} is not one of {', '.join(ARCHIVES)}")
    module, card = load_model(folder)
    if card.archived:
        raise ModelError(f"{folder} is a model of the format {card.architecture} already")
    origin = {
        "architecture": card.architecture,
        "arguments": card.arguments,
        "weights_sha256": card.weights_sha256,
    }
    card = replace(
        card,
        architecture=kind,
        arguments={},
        output=NetworkOutput(),
        training={**card.training, "exported_from": origin},
    )
    with _new_folder(out) as part:
        file = part / f"network.{kind}"
        try:
            _write(module, file, kind, card.patch_px)
        except ModelError:
            raise
        except Exception as error:  # torch's exporters fail in many ways
            raise ModelError(
                f"{folder}: {origin['architecture']} cannot be exported as {kind}:"
                f" {first_line(error)}"
            ) from error
        _save_archive(part, file, card)
        file.unlink()
        archive, card = load_model(part)
        _compare(module, archive, card.patch_px, folder)
    return card


def _importable(file: Path) -> str:
    """The kind of a file that a model can be made of."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    kind = file_kind(file)
    refuse_unsafe(file, kind)
    if kind == "other":
        raise ModelError(f"{file} is none of .pt2 (torch.export), .onnx and .safetensors")
    return kind


@dataclass(frozen=True)
class _Reading:
    """How an output is to be read, see `import_model`."""

    kind: Kind
    tumour_class: int | None


def _of_archive(
    file: Path, kind: str, architecture: str | None, patch_px: int | None, reading: _Reading
) -> tuple[nn.Module, NetworkPlan, int]:
    """The network of an archive, how to read it, and the side of its patches."""
    if architecture is not None:
        raise ModelError(f"{file} holds its network: leave out the architecture, {architecture}")
    network = open_archive(file, kind)
    patch_px = patch_px or network.takes.width_px
    if patch_px is None:
        raise ModelError(f"{file} takes patches of any size. Say which: patch_px")
    output = find_output(network, name=str(file), patch_px=patch_px, **asdict(reading))
    return network, NetworkPlan(architecture=kind, output=output), patch_px


def _of_weights(
    file: Path,
    architecture: str | None,
    arguments: dict[str, Any] | None,
    patch_px: int | None,
    reading: _Reading,
) -> tuple[nn.Module, NetworkPlan]:
    """The network of an architecture with the weights of a file, and how to build it."""
    if architecture is None:
        raise ModelError(
            f"{file} holds weights alone. Say of which network: the architecture is timm:NAME or"
            " module:function"
        )
    if architecture in ARCHIVES or not is_architecture(architecture):
        raise ModelError(
            f"architecture {architecture!r} is not one of {', '.join(OURS)}, timm:NAME or"
            " module:function"
        )
    if patch_px is None:
        raise ModelError(f"{file} does not state the size of its patches. Say it: patch_px")
    plan = plan_network(architecture, arguments=arguments, patch_px=patch_px, **asdict(reading))
    network = build_network(plan.architecture, plan.arguments)
    try:
        network.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{file}: does not fit {plan.architecture}: {error}") from error
    name = f"{plan.architecture} with the weights of {file.name}"
    output = find_output(network, name=name, patch_px=patch_px, **asdict(reading))
    return network, replace(plan, output=output)


def _with_library(card: ModelCard) -> ModelCard:
    return with_version(card, "timm") if card.architecture.startswith(TIMM) else card


def _save_archive(folder: Path, file: Path, card: ModelCard) -> None:
    weights = folder / card.weights_file
    shutil.copyfile(file, weights)
    write_card(folder, replace(card, weights_sha256=sha256(weights)))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write to; then it takes the place of a missing or empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is there already, and not empty. Give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(module: nn.Module, file: Path, kind: str, patch_px: int) -> None:
    """Trace a model with torch.export, and write what came out."""
    example = (torch.zeros(2, 3, patch_px, patch_px),)
    any_number = ({0: torch.export.Dim("batch")},)
    module.requires_grad_(False)
    if kind == "onnx":
        _need_onnx()
        with _quiet():
            torch.onnx.export(
                module, example, str(file),
                dynamo=True, dynamic_shapes=any_number, external_data=False, verbose=False,
                input_names=["patches"], output_names=["logits"],
            )  # fmt: skip
        return
    program = torch.export.export(module, example, dynamic_shapes=any_number)
    program.example_inputs = None  # of no use, and torch would write them as a pickle
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings of its own workings from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(
            'writing ONNX needs the libraries onnx and onnxscript: pip install "wsi_pipeline[onnx]"'
        ) from error


@torch.no_grad()
def _compare(module: nn.Module, archive: nn.Module, patch_px: int, folder: Path) -> None:
    """Refuse an archive that gives other probabilities than the model it was made of."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(COMPARED, 3, patch_px, patch_px, generator=generator)
    expected, found = (torch.sigmoid(of(patches).float()) for of in (module, archive))
    largest = float((expected - found).abs().max())
    if not largest <= LARGEST_DIFFERENCE:
        raise ModelError(
            f"{folder}: the exported network is not the same: its probabilities differ by up to"
            f" {largest:.2g}"
        )
