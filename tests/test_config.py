import pytest
from pydantic import ValidationError

from wsi_pipeline.config import Config, TileConfig


def settings(**values) -> Config:
    return Config.model_validate({"out": "run", "catalog": {"csv": "slides.csv"}, **values})


def test_defaults_are_the_lectures():
    config = settings()
    tile, train = config.tile, config.train
    assert (tile.patch_px, tile.stride_px, tile.inner_px, tile.level) == (512, 256, 256, 0)
    assert (train.learning_rate, train.alpha, train.momentum) == (5e-5, 0.9, 0.9)
    assert (train.halve_after, train.stop_after, train.weights) == (3, 5, "imagenet")
    assert config.evaluate.patch_threshold == 0.75


def test_gaps_between_inner_squares_may_be_asked_for():
    assert TileConfig(stride_px=512, gaps=True).stride_px == 512


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile": {"patch_size": 512}}, r"tile\.patch_size\n *Extra inputs.*512"),
        ({"tile": {"inner_px": 700}}, r"inner_px is 700 and patch_px 512"),
        ({"tile": {"stride_px": 512}}, r"stride_px is 512 and inner_px 256: .*or gaps to true"),
        ({"tile": {"level": 0, "mpp": 0.5}}, r"either level or mpp"),
        ({"catalog": {"csv": "a.csv", "slides": "b"}}, r"either csv or slides"),
        (
            {"catalog": {"csv": "a", "split": {"train": 0.5, "test": 0.2}}},
            r"add up to 0\.7, not 1",
        ),
        ({"evaluate": {"patch_threshold": 1.5}}, r"evaluate\.patch_threshold\n.*1\.5"),
        ({"train": {"name": "../x"}}, r"train\.name"),
        ({"train": {"model": "patchnet"}}, r"imagenet.*for patchnet it must be none or a file"),
        (
            {"train": {"model": "timm:resnet18"}},
            r"timm:resnet18 it must be none, pretrained or",
        ),
        ({"train": {"model": "vgg17"}}, r"'vgg17': it must be vgg16.*timm:NAME or module:function"),
        ({"train": {"model": "timm:"}}, r"'timm:': it must be"),
        ({"train": {"model": "onnx", "weights": "none"}}, r"'onnx': it must be"),
        ({"train": {"model": "my net:f"}}, r"'my net:f': it must be"),
        ({"train": {"weights": "pretrained"}}, r"pretrained, which is for networks of timm"),
        ({"train": {"arguments": {"depth": 3}}}, r"arguments are for.*vgg16 takes none"),
        ({"train": {"tumour_class": 1}}, r"tumour_class is for networks with classes: vgg16"),
        ({"train": {"std": [0.2, 0, 0.2]}}, r"train\.std"),
        (
            {"train": {"patchnet": {"patch_px": 14, "stride_px": 14, "padding": "valid"}}},
            r"patch_px is 14: 7 layers.*15 or more",
        ),
        ({"train": {"patchnet": {"patch_px": 21}}}, r"stride_px is 31 and patch_px 21"),
        ({"train": {"shades_of_gray": 0.5}}, r"train\.shades_of_gray\n.*0\.5"),
        (
            {
                "tile": {"patch_px": 32, "stride_px": 16, "inner_px": 16},
                "train": {
                    "model": "patchnet",
                    "weights": "none",
                    "patchnet": {"patch_px": 33, "stride_px": 33},
                },
            },
            r"train\.patchnet\.patch_px is 33 and tile\.patch_px 32",
        ),
        ({"train": {"hard_negative_share": 1.1}}, r"train\.hard_negative_share\n.*1\.1"),
        (
            {"evaluate": {"detections": {"radius_um": -1}}},
            r"evaluate\.detections\.radius_um\n.*-1",
        ),
    ],
)
def test_a_broken_rule_is_named_with_its_setting_and_value(values, message):
    with pytest.raises(ValidationError, match=message):
        settings(**values)
