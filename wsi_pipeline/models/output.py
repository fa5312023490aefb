"""What a network returns, as one logit of tumour for each patch."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.card import NetworkOutput

SMALLEST = 1e-7
"""Probabilities closer to 0 or 1 count as this far from it: their logit is finite in float32."""
TRIED = 2
"""Patches that a network is tried with."""


def tumour_logit(values: torch.Tensor, output: NetworkOutput) -> torch.Tensor:
    """The logit whose sigmoid is F, the probability of tumour.

    Of logits z, shape (N, C), it is ``z_k - log(sum of exp(z_j), j != k)`` with k the column of
    tumour: its sigmoid is the softmax's column k. Of a probability p it is ``log(p / (1 - p))``.

    Parameters
    ----------
    values : float tensor, shape (N,), (N, 1) or (N, C)
        What the network returns.
    output : NetworkOutput

    Returns
    -------
    tensor, shape (N,)
        float32 where the values are of a lower precision.
    """
    values = values if values.dtype == torch.float64 else values.float()
    column = output.tumour_class
    if output.kind == "probability":
        chosen = values.flatten() if column is None else values[:, column]
        return torch.logit(chosen, eps=SMALLEST)
    if column is None:
        return values.flatten()
    others = torch.cat([values[:, :column], values[:, column + 1 :]], dim=1)
    return values[:, column] - torch.logsumexp(others, dim=1)


def give_tumour_logit(network: nn.Module, output: NetworkOutput) -> nn.Module:
    """Make a network return one logit of tumour for each patch.

    A hook does it: the network's modules and weights keep their names.

    Returns
    -------
    nn.Module
        The network itself.
    """
    network.register_forward_hook(partial(_as_logit, output))
    return network


def _as_logit(output: NetworkOutput, _network, _images, values: torch.Tensor) -> torch.Tensor:
    return tumour_logit(values, output)


@dataclass(frozen=True)
class _Trial:
    """What a network returned for some patches."""

    values: object
    patch_px: int
    name: str

    @property
    def text(self) -> str:
        """For messages."""
        size = f"{self.patch_px} x {self.patch_px} px"
        found = (
            f"an output of shape {tuple(self.values.shape)}"
            if isinstance(self.values, torch.Tensor)
            else f"a {type(self.values).__name__}"
        )
        return f"{self.name} returns {found} for {TRIED} patches of {size}"


def find_output(
    network: nn.Module,
    *,
    name: str,
    patch_px: int,
    kind: str = "logit",
    tumour_class: int | None = None,
) -> NetworkOutput:
    """Try a network on random patches, and find out how its output is to be read.

    Parameters
    ----------
    network : nn.Module
        On the CPU. It is left in evaluation mode.
    name : str
        For messages.
    patch_px : int
    kind : {"logit", "probability"}
    tumour_class : int, optional
        The column that is tumour; unless given, column 1 of two.

    Returns
    -------
    NetworkOutput

    Raises
    ------
    ModelError
        If the network fails, or returns no such output.
    """
    trial = _Trial(_run(network, name, patch_px), patch_px, name)
    shape = tuple(trial.values.shape) if isinstance(trial.values, torch.Tensor) else None
    if shape in ((TRIED,), (TRIED, 1)):
        if tumour_class is not None:
            raise ModelError(
                f"{trial.text}, which has no classes, but the tumour class is {tumour_class}. Leave"
                " it out"
            )
        return _checked(NetworkOutput(kind=kind), trial)  # type: ignore[arg-type]
    if shape is None or len(shape) != 2 or shape[0] != TRIED:
        raise ModelError(f"{trial.text}. It must be (N,), (N, 1) or (N, classes) for N patches")
    if tumour_class is None and shape[1] != 2:
        raise ModelError(f"{trial.text}. Say which column is tumour, from 0 on: the tumour class")
    column = 1 if tumour_class is None else tumour_class
    if column >= shape[1]:
        raise ModelError(f"{trial.text}. It has no column {column}, which is to be tumour")
    return _checked(NetworkOutput(kind=kind, tumour_class=column), trial)  # type: ignore[arg-type]


def _run(network: nn.Module, name: str, patch_px: int) -> object:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(TRIED, 3, patch_px, patch_px, generator=generator)
    try:
        with torch.no_grad():
            return network.eval()(patches)
    except Exception as error:  # of anybody's code
        raise ModelError(
            f"{name} cannot be run on {TRIED} patches of {patch_px} x {patch_px} px:"
            f" {first_line(error)}"
        ) from error


def _checked(output: NetworkOutput, trial: _Trial) -> NetworkOutput:
    """Refuse what is no number, or no probability."""
    values = trial.values
    assert isinstance(values, torch.Tensor)
    if not values.is_floating_point() or not values.isfinite().all():
        raise ModelError(f"{trial.text}, of type {values.dtype}, that are not all finite numbers")
    if output.kind == "probability" and not ((values >= 0) & (values <= 1)).all():
        raise ModelError(
            f"{trial.text}, with values from {values.min():.4g} to {values.max():.4g}. They are no"
            " probabilities: the output is logits"
        )
    return output


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
