"""The named exceptions. Each message holds the bad value, the rule it breaks and the file."""


class WsiError(Exception):
    """Base of every error that a user can mend: shown without a traceback."""


class ConfigError(WsiError):
    """A setting is missing, unknown or out of its range."""


class CatalogError(WsiError):
    """The list of slides contradicts itself or names what is not there."""


class SlideError(WsiError):
    """A slide cannot be opened, or lacks what a stage needs (a resolution, say)."""


class ResolutionError(SlideError):
    """A slide's resolution is neither stated plausibly nor given."""


class SlideReadError(SlideError):
    """A region of an open slide could not be decoded, twice."""


class AnnotationError(WsiError):
    """An annotation file is malformed, or holds nothing that the settings select."""


class MaskError(WsiError):
    """A tissue mask made elsewhere is malformed, or does not fit its slide."""


class ModelError(WsiError):
    """Weights or a model description cannot be loaded."""


class RunError(WsiError):
    """A run directory lacks the files that a stage needs, or holds damaged ones."""


class ExportError(WsiError):
    """An export cannot be made: the message says why."""
