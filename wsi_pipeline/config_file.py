"""The settings file: YAML, read into sections and written from them, bare or with comments."""

from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from wsi_pipeline.config import Config, Section
from wsi_pipeline.errors import ConfigError

RENAMED = {
    "mixed_precision": "this setting is now `precision`: float32 (was false), bfloat16 (was true)"
    " or null",
    "min_saturation": "this setting is gone. `min_chroma` is a threshold on colour relative to the"
    " slide's own glass; leave it out for its default",
}
"""Settings of earlier versions."""

PATHS_OF_CATALOG = ("csv", "slides", "annotations", "tissue", "exclude")


def load_config(path, **overrides) -> Config:
    """Read a YAML file; relative paths in it count from the current folder.

    They come back absolute, since workers may run in other folders.

    Parameters
    ----------
    path : path-like
    **overrides
        Top-level values or, for sections, dictionaries of values that replace the file's.

    Raises
    ------
    ConfigError
        If the file is missing, is no YAML, or breaks a rule; the message lists each setting
        with the value found.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a mapping of settings")
    for key, value in overrides.items():
        found = values.get(key) or {}
        if not isinstance(value, dict):
            values[key] = value
        elif isinstance(found, dict):  # else it is no section, which the rules find out
            values[key] = {**found, **value}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {broken_rules(error)}") from None
    return _with_absolute_paths(config)


def read_yaml(path: Path) -> object:
    """Read plain values from a YAML file.

    Raises
    ------
    ConfigError
        If the file is missing or is no YAML; the message says, in a line, where and why.
    """
    try:
        return yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        at, why = error.problem_mark, ": ".join(filter(None, (error.context, error.problem)))
        place = f"{path}, line {at.line + 1}, column {at.column + 1}" if at else str(path)
        raise ConfigError(f"{place}: cannot be read as YAML: {why}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {why}") from error


def _with_absolute_paths(config: Config) -> Config:
    paths = {name: getattr(config.catalog, name) for name in PATHS_OF_CATALOG}
    paths = {name: found and found.expanduser().absolute() for name, found in paths.items()}
    weights, path = config.train.weights, config.train.weights_path
    if path is not None:
        weights = str(path.expanduser().absolute())
    hard = config.train.hard_negatives
    files = {"weights": weights, "hard_negatives": hard and hard.expanduser().absolute()}
    return config.model_copy(
        update={
            "out": config.out.expanduser().absolute(),
            "catalog": config.catalog.model_copy(update=paths),
            "train": config.train.model_copy(update=files),
        }
    )


def broken_rules(error: ValidationError) -> str:
    """Say which settings break a rule, with the value found."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'settings'}: {_rule(item)}"
        + ("" if isinstance(item["input"], dict) else f" (found {item['input']!r})")
        for item in error.errors()
    )


def _rule(item: ErrorDetails) -> str:
    if item["type"] != "extra_forbidden":
        return item["msg"]
    return RENAMED.get(str(item["loc"][-1]), "there is no such setting")


def dump_config(config: Config) -> str:
    """Settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def commented_yaml(config: Config) -> str:
    """Settings as YAML with each field's description as a comment before or behind it."""
    return "\n".join(_section_lines(config, indent="")) + "\n"


def _section_lines(section: Section, indent: str):
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield "" if not indent else f"{indent}#"
            yield f"{indent}# {(type(value).__doc__ or '').splitlines()[0]}"
            yield f"{indent}{name}:"
            yield from _section_lines(value, indent + "  ")
            continue
        plain = section.model_dump(mode="json", include={name})[name]
        if field.description:
            yield f"{indent}# {field.description}"
        text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
        yield f"{indent}{name}: {text.splitlines()[0]}"
