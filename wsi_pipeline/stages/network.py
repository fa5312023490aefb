"""The network that the settings of training name, tried before any work starts."""

from dataclasses import replace

from wsi_pipeline.config import Config
from wsi_pipeline.models.architectures import NetworkPlan, plan_network
from wsi_pipeline.models.card import TIMM
from wsi_pipeline.models.start import start_model


def network_plan(config: Config) -> NetworkPlan:
    """How to build the network that `train.model` names.

    Networks of timm and of the user's own are built and run on two random patches.

    Raises
    ------
    ModelError
        If the network cannot be built, does not take patches of `tile.patch_px`, returns something
        else than it has to, or has no head to train alone where `train.freeze` asks for that.
    """
    settings = config.train
    arguments = dict(settings.arguments)
    if settings.model == "patchnet":
        arguments = settings.patchnet.model_dump()
    elif settings.model.startswith(TIMM):
        arguments["pooling"] = settings.pooling
    plan = plan_network(
        settings.model,
        patch_px=config.tile.patch_px,
        arguments=arguments,
        tumour_class=settings.tumour_class,
    )
    if settings.freeze:
        start_model(plan.architecture, "none", arguments=plan.arguments, freeze=True)
    return replace(plan, mean=settings.mean or plan.mean, std=settings.std or plan.std)
