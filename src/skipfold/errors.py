"""Every error that skipfold raises on purpose: one line for the user, one class a domain."""

import re

TOO_LARGE = re.compile(r"can't allocate memory|out of memory|not enough memory|overflow", re.IGNORECASE)
"""What torch's allocators, and its counts of bytes, say of sizes that are too large; they have no type of their own."""


class SkipfoldError(Exception):
    """Base of all of skipfold's errors; its text says what is wrong, what is allowed and what to do."""


class ConfigError(SkipfoldError):
    """A configuration key or notebook parameter is unknown, of the wrong type or out of range."""


class DataError(SkipfoldError):
    """A data file is missing, truncated or altered."""


class DeviceError(SkipfoldError):
    """The device asked for is absent or too small."""


class StoreError(SkipfoldError):
    """The store of trial records cannot be written or read."""


class NotebookError(SkipfoldError):
    """A notebook failed."""


class VerificationError(SkipfoldError):
    """Results, sources and report do not belong together."""


class NotAffineError(SkipfoldError):
    """A module that was to be collapsed is not affine; `offenders` maps submodule paths to reasons."""

    def __init__(self, message: str, offenders: dict[str, str] | None = None):
        super().__init__(message)
        self.offenders = offenders or {}


class SkipError(SkipfoldError):
    """Skip connections cannot be given a strength, or cannot be removed at the present one."""


class NoSkipsError(SkipError):
    """No block of a network adds a skip connection."""


class ExactnessError(SkipfoldError):
    """Equality in rational arithmetic cannot be proved: the network is too large, or no recursion, or not equal."""


class CollapseError(SkipfoldError):
    """A module, its input or the memory allowed does not let it be collapsed; its subclasses say which."""


class ModuleError(CollapseError):
    """What is given is not a module of Python code, cannot be copied, or is another function in float64."""


class InputShapeError(CollapseError):
    """The module does not take inputs of the shape given, or does not give one tensor."""


class WeightsError(CollapseError):
    """The module's parameters are none, not finite, complex or integer, or on several devices."""


class MemoryBoundError(CollapseError):
    """Collapsing would take more memory than is allowed; `needed` is the least that it takes, in bytes."""

    def __init__(self, message: str, needed: int = 0):
        super().__init__(message)
        self.needed = needed


class NotConvolutionError(CollapseError):
    """A chain of layers is not one larger convolution."""


class TrainingModeError(NotAffineError):
    """BatchNorm or Dropout submodules are in training mode; `offenders` names them and whatever else is not affine."""


class CheckpointError(SkipfoldError):
    """A file of weights is missing, damaged, holds code, or does not fit the network named."""


class ExportError(SkipfoldError):
    """A network could not be written, or what was written does not give its outputs."""


def check_count(value: object, name: str, least: int = 1) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: {value!r} given; a whole number of at least {least} is allowed")


def first_line(error: Exception) -> str:
    """What `error` says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_too_large(error: Exception) -> bool:
    """Whether `error`, of whatever library, says that something does not fit into memory."""
    return isinstance(error, MemoryError | OverflowError) or bool(TOO_LARGE.search(str(error)))
