"""Networks in a file of their own format, torch.export's or ONNX: for inference alone."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import NetworkOutput
from wsi_pipeline.models.model_folder import file_kind, refuse_unsafe
from wsi_pipeline.models.output import first_line, tumour_logit
from wsi_pipeline.models.pt2_check import check_pt2

ONNX_INPUT = "tensor(float)"


@dataclass(frozen=True)
class FixedInput:
    """Which axes of its input (N, 3, H, W) an archive has fixed; None: any size."""

    batch: int | None
    height_px: int | None
    width_px: int | None

    @property
    def size_text(self) -> str:
        """Width and height for messages."""
        return " x ".join("any" if n is None else str(n) for n in (self.width_px, self.height_px))

    def takes(self, height_px: int, width_px: int) -> bool:
        """Whether patches of a size fit."""
        return self.height_px in (None, height_px) and self.width_px in (None, width_px)


class Archive(nn.Module):
    """An archived network: it has neither weights nor layers that could be seen, and never moves.

    It computes in float32. Where the file has fixed the number of patches, batches are cut and
    filled up with zeros.

    Parameters
    ----------
    path : Path
    run : callable
        Contiguous float32 (N, 3, H, W), on `device`, to the network's output.
    takes : FixedInput
    device : torch.device

    Attributes
    ----------
    output : NetworkOutput or None
        None: forward returns the network's own output.
    """

    def __init__(
        self,
        path: Path,
        run: Callable[[torch.Tensor], torch.Tensor],
        takes: FixedInput,
        device: torch.device,
    ):
        super().__init__()
        self.path, self.run, self.takes, self.device = path, run, takes, device
        self.output: NetworkOutput | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised patches.

        Parameters
        ----------
        images : float tensor, shape (N, 3, H, W)

        Returns
        -------
        tensor, shape (N,)
            Without an `output`, what the network returns.

        Raises
        ------
        ModelError
            If the file's network takes patches of another size.
        """
        height, width = images.shape[-2:]
        if not self.takes.takes(height, width):
            raise ModelError(
                f"{self.path} takes patches of {self.takes.size_text} px, but patches are"
                f" {width} x {height} px"
            )
        values = self._in_batches(images.float().contiguous())
        return values if self.output is None else tumour_logit(values, self.output)

    def _in_batches(self, images: torch.Tensor) -> torch.Tensor:
        size = self.takes.batch
        if size is None:
            return self.run(images)
        parts = []
        for part in images.split(size):
            missing = part.new_zeros(size - len(part), *part.shape[1:])
            parts.append(self.run(torch.cat([part, missing]))[: len(part)])
        return torch.cat(parts)


def open_archive(
    path: str | Path,
    kind: str,
    *,
    patch_px: int | None = None,
    output: NetworkOutput | None = None,
    device: torch.device | str = "cpu",
) -> Archive:
    """Open an archived network.

    Parameters
    ----------
    path : path-like
    kind : {"pt2", "onnx"}
    patch_px : int, optional
        Side of the patches that it is to take.
    output : NetworkOutput, optional
        How its output is read; unless given, `Archive.forward` returns the output itself.
    device : torch.device or str

    Raises
    ------
    ModelError
        If the file is missing, damaged, of another kind, could run code when it is loaded, takes
        patches of another size, or needs a library that is missing.
    """
    path, device = Path(path), torch.device(device)
    found = file_kind(path)
    refuse_unsafe(path, found)
    if found != kind:
        raise ModelError(f"{path} is not a file of the format {kind}")
    try:
        archive = (_open_pt2 if kind == "pt2" else _open_onnx)(path, device)
    except ModelError:
        raise
    except Exception as error:  # torch's and onnxruntime's own for damaged files are many
        raise ModelError(f"{path} cannot be opened: {first_line(error)}") from error
    if patch_px is not None and not archive.takes.takes(patch_px, patch_px):
        raise ModelError(
            f"{path} takes patches of {archive.takes.size_text} px, the card says {patch_px}."
            " Correct patch_px, or export the network for this size"
        )
    archive.output = output
    return archive.eval()


def _open_pt2(path: Path, device: torch.device) -> Archive:
    _check_examples(path, check_pt2(path))
    program = torch.export.load(path)
    program._guards_code = []  # conditions as Python: sizes are checked here instead
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    [name] = _only_input(path, program.graph_signature.user_inputs)
    if len(program.graph_signature.user_outputs) != 1:
        raise ModelError(
            f"{path} returns {len(program.graph_signature.user_outputs)} values: it must be one"
        )
    [node] = [of for of in program.graph.nodes if of.op == "placeholder" and of.name == name]
    takes = _fixed_input(path, [of if type(of) is int else None for of in node.meta["val"].shape])
    if node.meta["val"].dtype != torch.float32:
        raise ModelError(f"{path} takes {node.meta['val'].dtype}: it must be torch.float32")
    module = program.module(check_guards=False)
    module.requires_grad_(False)
    return Archive(path, module.forward, takes, device)


def _check_examples(path: Path, content: bytes) -> None:
    """Refuse example inputs that are more than tensors: torch would unpickle them anyhow."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} holds example inputs that are not plain tensors, by which loading it could run"
            " code. Save the network again with example_inputs set to None"
        ) from error


def _open_onnx(path: Path, device: torch.device) -> Archive:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f'{path}: ONNX files need the library onnxruntime: pip install "wsi_pipeline[onnx]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # a worker's own share of the cores
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    available = onnxruntime.get_available_providers()
    providers = [name for name in wanted if name in available] + ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    [given] = _only_input(path, session.get_inputs())
    if len(session.get_outputs()) != 1:
        raise ModelError(f"{path} returns {len(session.get_outputs())} values: it must be one")
    if given.type != ONNX_INPUT:
        raise ModelError(f"{path} takes {given.type}: it must be {ONNX_INPUT}")
    takes = _fixed_input(path, [of if isinstance(of, int) else None for of in given.shape])

    def run(images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad:
            raise ModelError(f"{path.name} computes without gradients")
        [values] = session.run(None, {given.name: images.cpu().numpy()})
        return torch.from_numpy(values).to(images.device)

    return Archive(path, run, takes, device)


def _only_input(path: Path, inputs) -> list:
    if len(inputs) != 1:
        raise ModelError(f"{path} takes {len(inputs)} inputs: it must be one, of patches")
    return list(inputs)


def _fixed_input(path: Path, shape: list[int | None]) -> FixedInput:
    if len(shape) != 4 or shape[1] not in (None, 3):
        raise ModelError(
            f"{path} takes an input of shape {tuple('any' if n is None else n for n in shape)}: it"
            " must be (N, 3, H, W)"
        )
    return FixedInput(shape[0], shape[2], shape[3])
