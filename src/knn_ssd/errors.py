"""The errors that a user can meet, in one tree.

    KnnSsdError                   states the fact, the value and the remedy (`hint`)
    ├── UsageError                an option or argument that cannot be used (also a ValueError)
    ├── PromptError               a prompt or prompt file that cannot be used (also a ValueError)
    ├── ModelError                a model that cannot be found or read
    │   └── UnsupportedModelError a model that was read but cannot run here
    ├── AtlasError                an atlas that cannot be found or read
    │   └── AtlasMismatchError    an atlas that was calibrated on another model; lists the differences
    ├── AnswerStoreError          an answer store that cannot be found or read
    │   └── AnswerStoreMismatchError  an answer store of another model; lists the differences
    ├── MemoryLimitError          a request that does not fit into memory
    │   └── MemoryInUseError      a request that would fit, were it not for others that run now
    ├── OutputError               a file or folder that cannot be written
    ├── BenchError                a benchmark that cannot be run, or records that cannot be read
    └── CalibrationError          a calibration that cannot continue
        └── Interrupted           a calibration that was stopped and can be resumed

The command line shows such an error as one sentence and exits with code 2. Any other exception is a bug.
"""

from __future__ import annotations


class KnnSsdError(Exception):
    """The root of the tree.

    Args:
        message: the fact and the value: a sentence without its full stop.
        hint: what the user can do about it, if anything.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UsageError(KnnSsdError, ValueError):
    """An option or argument that cannot be used."""


class PromptError(KnnSsdError, ValueError):
    """A prompt, or a file of prompts, that cannot be used."""


class ModelError(KnnSsdError):
    """A model that cannot be found or read."""


class UnsupportedModelError(ModelError):
    """A model whose structure or state does not allow it to draft for itself."""


class AtlasError(KnnSsdError):
    """An atlas that cannot be found or read."""


class AtlasMismatchError(AtlasError):
    """An atlas that was calibrated on another model."""

    def __init__(self, message: str, differences: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(f"{message}: {'; '.join(differences)}", hint)
        self.differences = differences


class AnswerStoreError(KnnSsdError):
    """An answer store that cannot be found or read."""


class AnswerStoreMismatchError(AnswerStoreError):
    """An answer store of another model."""

    def __init__(self, message: str, differences: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(f"{message}: {'; '.join(differences)}", hint)
        self.differences = differences


class MemoryLimitError(KnnSsdError):
    """A request that does not fit into memory."""


class MemoryInUseError(MemoryLimitError):
    """A request that would fit into memory, were it not for others that run now."""


class OutputError(KnnSsdError):
    """A file or folder that cannot be written."""


class BenchError(KnnSsdError):
    """A benchmark that cannot be run, or records that cannot be read."""


class CalibrationError(KnnSsdError):
    """A calibration that cannot continue."""


class Interrupted(CalibrationError):
    """A calibration that was stopped early; its results so far are kept, and it can be resumed."""
