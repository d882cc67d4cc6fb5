"""The one place where objects, classes and registries of others are changed, each change with a way back.

Every function makes its change at once and returns a Handle. `undo` leaves alone what somebody else has changed since:
taking ours out would take theirs out as well. Handles name the object that they have changed and hold no closure, since
a copied or pickled model takes them along, and a copy must undo its own. The rows of this room (`table.py`) list every
call from elsewhere; a test holds that nothing is changed without one.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from remoe_adapt._support import held_back


class Handle(abc.ABC):
    """A change that stands until `undo`, or until the end of a `with` block. Undoing it again does nothing."""

    @abc.abstractmethod
    def undo(self) -> None:
        """What was changed is as before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


class Patches(Handle):
    """Several changes with one way back: the last one first."""

    def __init__(self, *placed: Handle) -> None:
        self._placed = list(placed)

    def add(self, *placed: Handle) -> None:
        """These are undone before the earlier ones."""
        self._placed += placed

    def remove(self) -> None:
        """Undo all of them. A Ctrl-C waits meanwhile, or half of them would stay for good."""
        with held_back():
            while self._placed:
                self._placed.pop().undo()

    undo = remove


class _Value(Handle):
    """`name` of an object, a class or a mapping has another value."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._tableer, self._name, self._value = owner, name, value
        self._before = self._held()
        self._stands = True
        self._write((value,))

    @property
    def _table(self) -> Any:
        return self._tableer if isinstance(self._tableer, MutableMapping) else vars(self._tableer)

    def _held(self) -> tuple[Any, ...]:
        """The value that the owner itself has, alone; empty where it has none, and its class answers."""
        if self._name == "__class__":
            return (type(self._tableer),)
        return (self._table[self._name],) if self._name in self._table else ()

    def _write(self, value: tuple[Any, ...]) -> None:
        # Past the owner's own `__setattr__`: a module would take the value for a part of its state, an enum refuse it.
        if self._name == "__class__":
            object.__setattr__(self._tableer, self._name, *value)
        elif isinstance(self._tableer, type):
            change: Any = type.__setattr__ if value else type.__delattr__
            change(self._tableer, self._name, *value)
        elif value:
            self._table[self._name] = value[0]
        else:
            del self._table[self._name]

    def undo(self) -> None:
        held = self._held()
        # Another value there is somebody's who has changed it since, perhaps by wrapping ours: it stays.
        if self._stands and held and held[0] is self._value:
            self._write(self._before)
        # The same value may be put on again, by a handle of its own: this one must not take that off.
        self._stands = False


class _Listed(Handle):
    def __init__(self, values: list[Any], value: Any) -> None:
        self._values, self._value = values, value
        values.append(value)

    def undo(self) -> None:
        if self._value in self._values:
            self._values.remove(self._value)


class _Hooked(Handle):
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def undo(self) -> None:
        self._handle.remove()


def put_on(owner: Any, name: str, value: Any) -> Handle:
    """This attribute of one object is `value`, or this entry of a registry; others of its class are as before."""
    return _Value(owner, name, value)


def carry(owner: Any, name: str, value: Any) -> None:
    """`put_on` for good, on an object of short life."""
    # No handle: compiled steps come by here, and torch.compile traces an assignment but no `vars`.
    setattr(owner, name, value)


def override(owner: Any, name: str, around: Callable[..., Any]) -> Handle:
    """`owner.name(...)` is `around(original, ...)`; nothing where the owner has no such method.

    owner: one object, whose class stays as it is; or a class, whose class methods stay class methods.

    The signature stays the original's: transformers reads that of `prepare_inputs_for_generation`.
    """
    if (original := getattr(owner, name, None)) is None:
        return Patches()
    if not isinstance(owner, type):
        # A partial and no function: a copy of the model then calls the copy's own method, and not the first model's.
        return _Value(owner, name, functools.wraps(original)(functools.partial(around, original)))
    held = inspect.getattr_static(owner, name)
    function = held.__func__ if isinstance(held, classmethod) else held

    # In a class a partial would not be bound to the object that it is called on.
    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    return _Value(owner, name, classmethod(method) if isinstance(held, classmethod) else method)


def class_attribute(cls: type, name: str, value: Any) -> Handle:
    """This attribute of a class is `value`, for all threads: hold a lock where it is for a while only."""
    return _Value(cls, name, value)


def become(owner: Any, mixin: type) -> Handle:
    """The object's class becomes one of the same name that derives from `mixin` and from its class, in this order."""
    return _Value(owner, "__class__", _subclass(owner.__class__, mixin))


# Made once, so that all objects of a class that become the same have one class.
@functools.cache
def _subclass(cls: type, mixin: type) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def hook(module: nn.Module, kind: str, function: Callable[..., Any], **options: Any) -> Handle:
    """torch calls the function at this module.

    kind: "forward", "forward_pre", "state_dict_post", "load_state_dict_pre", as in torch's `register_..._hook`.
    options: of that method.
    """
    return _Hooked(getattr(module, f"register_{kind}_hook")(function, **options))


def replace_module(root: nn.Module, path: str, module: nn.Module) -> Handle:
    """The module at this path below `root` is another one."""
    parent, _, name = path.rpartition(".")
    return _Value(root.get_submodule(parent)._modules, name, module)


def append_entry(values: list[Any], value: Any) -> Handle:
    """A list of a library has this value at its end, once."""
    return Patches() if value in values else _Listed(values, value)


def enum_member(kind: Any, name: str) -> Handle:
    """A str enum has one member more, whose value is its name. Enums offer no way in, so their tables are written."""
    member = str.__new__(kind, name)
    # EnumType sets these four while it makes a class, and never again.
    member._name_ = member._value_ = name
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    maps = (_Value(table, name, member) for table in (kind._member_map_, kind._value2member_map_))
    # The attribute comes first, because an enum whose tables know a name refuses to take it once more.
    return Patches(_Value(kind, name, member), _Listed(kind._member_names_, name), *maps)


class Snapshot:
    """The modules of a model as they are: attributes, children, parameters, hooks, flags and who is trained.

    The values of parameters are not copied, but for `values`: a load that only adds an adapter changes no others.
    """

    def __init__(self, root: nn.Module, values: Iterable[Tensor] = ()) -> None:
        self._modules = [(module, dict(vars(module)), _contents(module)) for module in root.modules()]
        self._trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Put everything back; modules that were added are let go."""
        for module, attributes, contents in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, held in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(held)
        for parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers among the attributes, the registries of torch and PEFT's among them, with what they hold."""
    return [
        (value, list(value.items()) if isinstance(value, dict) else list(value))
        for value in vars(module).values()
        if isinstance(value, (dict, list, set))
    ]
