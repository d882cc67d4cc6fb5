"""Every exception this package raises on purpose.

RemoeError(Exception)
 |- ConfigError(ValueError)               an option value; names the value and the remedy
 |   |- ProfileError                      a profile file; names file, line and key
 |   `- UncacheableError                  a model whose experts cannot be cached; says why
 |- RouterError
 |   |- RouterNotFoundError(ValueError)   the model has no router
 |   `- UnsupportedRouterError(ValueError)  a router we refuse, with the reason
 |- AdapterError(ValueError)
 |   |- AdapterConflictError              name collision, LoRA on a router, nested tuners
 |   |- AdapterCorruptError               truncated, wrong shape, NaN
 |   |- FingerprintMismatchError          made for another base; names both
 |   `- MergeStateError                   illegal in this merge state (swap while merged)
 |- DialError(ValueError)                 a dial that is closed, or cannot do this to its model now
 |- FamilyError(ValueError)               family.json or its adapter folders
 |- ExportError(ValueError)               a checkpoint or GGUF that cannot take the family's routers
 |- WriteError(OSError)                    a result that cannot be written; names it and the reason
 |- TraceError(ValueError)                a trace file or array
 |- DataError(ValueError)                 training or evaluation text
 |- ExpertReadError(OSError)              an expert's bytes in a checkpoint; names file, tensor and offset
 |- ServerError                           a llama-server that refuses, or whose state we cannot drive
 |   `- ServerDownError(ConnectionError)   it does not answer now, or is still loading its model
 `- MissingDependencyError(ImportError)   names the extra to install

The second base lets callers who know only the standard exceptions catch what they expect.
"""

from __future__ import annotations


class RemoeError(Exception):
    """Base of all errors of this package: one `except` catches every deliberate refusal."""


class ConfigError(RemoeError, ValueError):
    """An option has a value that cannot work; the message names the value and the remedy."""


class ProfileError(ConfigError):
    """A device profile cannot be used; the message names the file, the line and the key."""


class UncacheableError(ConfigError):
    """The model's experts cannot be left in storage: not behind transformers' experts interface, or quantised."""


class RouterError(RemoeError):
    """Something about the routers of a model."""


class RouterNotFoundError(RouterError, ValueError):
    """The model has no mixture-of-experts router that we can find."""


class UnsupportedRouterError(RouterError, ValueError):
    """The model has a router that we refuse to adapt; the message says why."""


class AdapterError(RemoeError, ValueError):
    """An adapter cannot be added, loaded or used."""


class AdapterConflictError(AdapterError):
    """The adapter collides with another one: equal names, LoRA on a router, nested tuners."""


class AdapterCorruptError(AdapterError):
    """The adapter's weights are truncated, of the wrong shape, or not finite."""


class FingerprintMismatchError(AdapterError):
    """The adapter was made for another base model; the message names both."""


class MergeStateError(AdapterError):
    """The operation is illegal in the present merge state, as a swap while merged."""


class DialError(RemoeError, ValueError):
    """A dial cannot do this now: it is closed, its model is inside a forward, or its routers are out of its reach."""


class FamilyError(RemoeError, ValueError):
    """A family folder is malformed, incomplete, or does not hold the point asked for."""


class ExportError(RemoeError, ValueError):
    """A checkpoint or GGUF file is damaged, or cannot carry the routers of the family; the message says why."""


class WriteError(RemoeError, OSError):
    """A result cannot be written: a full or read-only disk, a missing permission; nothing of it is left."""


class TraceError(RemoeError, ValueError):
    """A trace is malformed or does not fit what is asked of it."""


class DataError(RemoeError, ValueError):
    """A data file or its contents cannot be used for training or evaluation."""


class ExpertReadError(RemoeError, OSError):
    """The bytes of an expert cannot be read from its checkpoint; the message names file, tensor and offset."""


class ServerError(RemoeError):
    """A llama-server refuses what is asked of it, or is not set up so that it can be driven; names the remedy."""


class ServerDownError(ServerError, ConnectionError):
    """A llama-server does not answer now, or is still loading its model: try again later."""


class MissingDependencyError(RemoeError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""
