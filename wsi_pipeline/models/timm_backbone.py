"""timm's networks as patch classifiers: their features, global pooling, one dense unit."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from wsi_pipeline.errors import ModelError
from wsi_pipeline.models.output import first_line
from wsi_pipeline.models.vgg16 import dense_unit, start_dense_unit

HEAD_STD = 0.01
"""Of the dense unit's first weights, as in VGG16."""
HUB = "hf-hub:"
"""What the name of a network that a hub describes begins with."""
SIZES = {"dynamic_img_size", "img_size"}
"""Arguments by which networks take images of other sizes than their own."""
LEFT_OUT = ("attn_pool.", "head_dist.")
"""Weights that timm's pooling of tokens has, which ours replaces."""


class TimmBackbone(nn.Module):
    """Probability of cancer in a patch, as a logit: the lecture's head on a network of timm's.

    As in `VGG16`, the largest value (or the mean) of each feature over all positions goes to one
    dense unit. Positions are those of feature maps, or tokens without class and register tokens.

    The features start as timm starts them, the dense unit normal with standard deviation
    `HEAD_STD`; bias zero.

    Parameters
    ----------
    name : str
        As timm knows it.
    pooling : {"max", "average"}
    **arguments
        Of ``timm.create_model``.

    Attributes
    ----------
    features : nn.Module
        timm's network without classifier and pooling.
    head : nn.Linear
        Its features to the logit.

    Raises
    ------
    ModelError
        If timm is missing, or cannot make the network.
    """

    def __init__(self, name: str, *, pooling: Literal["max", "average"] = "max", **arguments):
        super().__init__()
        if pooling not in ("max", "average"):
            raise ModelError(f"pooling is {pooling!r}: it must be 'max' or 'average'")
        self.pooling = pooling
        with _named_errors(name):
            self.features = _create(name, **arguments)
        self.head = nn.Linear(_feature_count(self.features), 1)
        start_dense_unit(self.head, std=HEAD_STD)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised patches.

        Parameters
        ----------
        images : float tensor, shape (N, 3, H, W)
            H and W as the network takes them.

        Returns
        -------
        tensor, shape (N,)
        """
        values = self._positions(self.features(images))
        return dense_unit(self.head, values.amax(2) if self.pooling == "max" else values.mean(2))

    def _positions(self, values: torch.Tensor) -> torch.Tensor:
        """Feature maps or tokens as shape (N, features, positions)."""
        if values.ndim == 3:
            return values[:, getattr(self.features, "num_prefix_tokens", 0) :].transpose(1, 2)
        if getattr(self.features, "output_fmt", "NCHW") == "NHWC":
            values = values.permute(0, 3, 1, 2)
        return values.flatten(2)


@dataclass(frozen=True, kw_only=True)
class TimmPlan:
    """How to make a network of timm's for patches of some size.

    Parameters
    ----------
    name : str
        timm's; of a hub's network that of its architecture.
    arguments : dict
        Of `TimmBackbone`; JSON-able.
    mean, std : tuple of float
        Of the images that its pretrained weights were trained on, scaled to 0..1.
    """

    name: str
    arguments: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def plan_timm(name: str, patch_px: int, arguments: dict[str, Any]) -> TimmPlan:
    """Find out how to make a network of timm's.

    Networks that are made for one size of image, as most transformers are, are made for patches.

    Parameters
    ----------
    name : str
        As timm knows it, or ``hf-hub:ORGANISATION/NAME``, whose description a hub gives.
    patch_px : int
    arguments : dict
        Of ``timm.create_model``.

    Raises
    ------
    ModelError
        If timm is missing, or cannot make the network.
    """
    described: dict[str, Any] = {}
    of_hub: dict[str, Any] = {}
    with _named_errors(name):
        if name.startswith(HUB):
            described, name, of_hub = _timm().models.load_model_config_from_hf(name[len(HUB) :])
        for size in [{}] if arguments.keys() & SIZES else _sizes(patch_px):
            needed = {**(of_hub or {}), **size, **arguments}
            try:
                encoder = _create(name, **needed)
                break
            except TypeError:  # the network has no such argument
                if not size:
                    raise
        found = {**_configuration(encoder), **described}
    return TimmPlan(
        name=name,
        arguments=needed,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )


def _feature_count(encoder: Any) -> int:
    """How many features come out of a network, behind the layers of its own head that stay."""
    return getattr(encoder, "head_hidden_size", None) or encoder.num_features


def _configuration(encoder: Any) -> dict[str, Any]:
    """What timm knows of a network's pretrained weights."""
    return encoder.pretrained_cfg


def _sizes(patch_px: int) -> Iterator[dict[str, Any]]:
    """Values of `SIZES` to try, the most flexible first."""
    yield {"dynamic_img_size": True}
    yield {"img_size": patch_px}
    yield {}


def pretrained_features(name: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The pretrained weights of a network's features, which timm downloads or has in its cache.

    Parameters
    ----------
    name : str
        As timm or, after ``hf-hub:``, a hub knows it.
    arguments : dict
        Of ``timm.create_model``.

    Raises
    ------
    ModelError
        If they cannot be had; the message says which file to put where.
    """
    try:
        return _create(name, pretrained=True, **arguments).state_dict()
    except ModelError:
        raise
    except Exception as error:  # of timm, its hub, or the network
        raise ModelError(
            f"timm has no pretrained weights of {name}, or cannot download them"
            f" ({first_line(error)}). {_where_to_get_them(name)}, copy the file here and set"
            " train.weights to its path"
        ) from error


def _where_to_get_them(name: str) -> str:
    if name.startswith(HUB):
        source = f"https://huggingface.co/{name[len(HUB) :]}"
    else:
        known = _timm().models.get_pretrained_cfg(name)
        hub = known and known.hf_hub_id
        source = f"https://huggingface.co/{hub}" if hub else getattr(known, "url", None) or "timm"
    return f"On a machine that can, download model.safetensors or its .bin from {source}"


def features_of_file(
    backbone: TimmBackbone, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a network's features among those of a file, under our names.

    Parameters
    ----------
    backbone : TimmBackbone
    state : dict
        timm's state dict of the network; its classifier is left out.

    Raises
    ------
    ModelError
        If some are missing or are others.
    """
    encoder = backbone.features
    state = _converted(state, encoder)
    classifier = _configuration(encoder).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    left_out = (*(f"{name}." for name in names), *LEFT_OUT)
    wanted = encoder.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(left_out)}
    missing, other = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or other:
        raise ModelError(
            f"its weights are not those of the network: {len(missing)} are missing"
            f" ({', '.join(missing[:3])}), {len(other)} are unknown ({', '.join(other[:3])})"
        )
    return {f"features.{name}": value for name, value in state.items()}


def _converted(state: dict[str, torch.Tensor], encoder: nn.Module) -> dict[str, torch.Tensor]:
    """A file's weights under timm's names of today, by timm's own conversion where it has one."""
    convert: Callable | None = getattr(
        sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None
    )
    if convert is None or encoder.state_dict().keys() <= state.keys():
        return state
    try:
        return convert(state, encoder)
    except Exception as error:  # of timm, for a file of another network
        raise ModelError(f"timm cannot convert its weights: {first_line(error)}") from error


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn what goes wrong in timm into one line that names the network."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        timm = _timm()
        plain = name.split(".")[0]
        if name.startswith(HUB) or plain in timm.list_models():
            why = f"timm cannot make {name}: {first_line(error)}"
            raise ModelError(why) from error
        alike = get_close_matches(plain, timm.list_models(), n=4)
        hint = f"Did you mean {', '.join(alike)}?" if alike else "See timm.list_models()"
        raise ModelError(f"timm does not know a network {name!r}. {hint}") from error


def _create(name: str, *, pretrained: bool = False, **arguments) -> nn.Module:
    """Make one of timm's networks without classifier and pooling."""
    fixed = {"num_classes": 0, "global_pool": ""}
    if wrong := sorted(fixed.keys() & arguments.keys()):
        raise ModelError(
            f"the argument {wrong[0]} of timm's {name} cannot be set: the classifier is ours"
        )
    return _timm().create_model(name, pretrained=pretrained, **fixed, **arguments)


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            'networks of timm need the library timm: pip install "wsi_pipeline[timm]"'
        ) from error
    return timm
