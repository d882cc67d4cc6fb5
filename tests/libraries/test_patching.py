"""Each change of an object of others and its undo: twice does nothing, what somebody else changed since stays."""

from __future__ import annotations

import copy
import enum
import pickle
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from remoe_adapt.libraries.patching import (
    Handle,
    Patches,
    Snapshot,
    append_entry,
    become,
    carry,
    class_attribute,
    enum_member,
    hook,
    override,
    put_on,
    replace_module,
)


class Base:
    kept = "inherited"

    def greet(self, name: str) -> str:
        return f"hello {name}"

    @classmethod
    def make(cls, name: str) -> str:
        return f"{cls.__name__} {name}"


class Owner(Base):
    own = "own"


class Louder:
    """A mixin."""

    def greet(self, name: str) -> str:
        return str(super().greet(name)).upper()  # type: ignore[misc]


class Colour(str, enum.Enum):  # noqa: UP042 (as PeftType is)
    RED = "RED"


def louder(original: Callable[..., str], *args: Any) -> str:
    return original(*args).upper()


def state_of(owner: Any) -> dict[str, Any]:
    return dict(vars(owner))


def test_an_attribute_of_one_object_and_the_way_back() -> None:
    owner, other = Owner(), Owner()
    before = state_of(owner)
    handle = put_on(owner, "kept", "ours")
    assert (owner.kept, other.kept) == ("ours", "inherited")
    handle.undo()
    assert state_of(owner) == before
    put_on(owner, "kept", "theirs")
    handle.undo()
    assert owner.kept == "theirs"


def test_an_attribute_that_holds_none_is_not_one_that_is_absent() -> None:
    owner = Owner()
    owner.kept = None  # type: ignore[assignment]
    put_on(owner, "kept", "ours").undo()
    assert state_of(owner) == {"kept": None}
    with put_on(owner, "more", None):
        assert "more" in vars(owner)
    assert "more" not in vars(owner)


def test_what_somebody_else_changed_since_stays() -> None:
    owner = Owner()
    handle = put_on(owner, "kept", "ours")
    owner.kept = "theirs"
    handle.undo()
    assert owner.kept == "theirs"


def test_an_undone_handle_does_not_take_off_the_same_value_put_on_again() -> None:
    owner, value = Owner(), object()
    first = put_on(owner, "kept", value)
    first.undo()
    put_on(owner, "kept", value)
    first.undo()
    assert owner.kept is value


def test_an_attribute_of_a_module_is_no_part_of_its_state() -> None:
    module, guest = nn.Linear(2, 2), nn.Linear(2, 2)
    with put_on(module, "guest", guest):
        assert module.guest is guest and len(list(module.modules())) == 1


def test_a_method_of_one_object_gets_its_original_and_keeps_its_signature() -> None:
    owner = Owner()
    handle = override(owner, "greet", louder)
    assert owner.greet("you") == "HELLO YOU" and Owner().greet("you") == "hello you"
    assert owner.greet.__name__ == "greet"
    handle.undo()
    assert state_of(owner) == {}
    override(owner, "absent", louder).undo()
    assert state_of(owner) == {}


def test_overrides_lie_over_each_other_and_are_undone_last_first() -> None:
    owner = Owner()
    patches = Patches(override(owner, "greet", louder))
    patches.add(override(owner, "greet", lambda original, name: original(name) + "!"))
    assert owner.greet("you") == "HELLO YOU!"
    patches.remove()
    patches.remove()
    assert state_of(owner) == {}


def test_a_class_for_a_while() -> None:
    before = dict(vars(Owner))
    with Patches(override(Owner, "greet", louder), override(Owner, "make", louder)):
        assert Owner().greet("you") == "HELLO YOU" and Owner.make("it") == "OWNER IT"
        assert isinstance(vars(Owner)["make"], classmethod)
        assert Base().greet("you") == "hello you"
    with class_attribute(Owner, "own", "ours"), class_attribute(Owner, "kept", "ours"):
        assert (Owner.own, Owner.kept, Base.kept) == ("ours", "ours", "inherited")
    assert dict(vars(Owner)) == before


def test_an_object_becomes_a_subclass_and_its_class_is_as_before() -> None:
    owner = Owner()
    handle = become(owner, Louder)
    assert owner.greet("you") == "HELLO YOU" and Owner().greet("you") == "hello you"
    other = Owner()
    with become(other, Louder):
        assert type(other) is type(owner) and type(owner).__name__ == "Owner" and isinstance(owner, Owner)
    assert type(other) is Owner
    owner.__class__ = Base  # type: ignore[assignment]
    handle.undo()
    assert type(owner) is Base


def test_a_module_in_its_parent_is_replaced_and_put_back() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    linear = root[0][0]  # type: ignore[index]
    handle = replace_module(root, "0.0", nn.Tanh())
    assert [type(module) for module in root.modules()][2:] == [nn.Tanh, nn.ReLU]
    handle.undo()
    assert root.get_submodule("0.0") is linear
    replace_module(root, "1", nn.Tanh())
    assert isinstance(root[1], nn.Tanh)


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        ("forward", "_forward_hooks"),
        ("forward_pre", "_forward_pre_hooks"),
        ("state_dict_post", "_state_dict_hooks"),
        ("load_state_dict_pre", "_load_state_dict_pre_hooks"),
    ],
)
def test_hooks_of_every_kind_are_taken_off(kind: str, attribute: str) -> None:
    module = nn.Linear(2, 2)
    handle = hook(module, kind, lambda *_: None)
    assert len(getattr(module, attribute)) == 1
    handle.undo()
    handle.undo()
    assert not getattr(module, attribute)


def test_a_hook_takes_torchs_options() -> None:
    seen: list[dict[str, Any]] = []
    module = nn.Linear(2, 2)
    with hook(module, "forward_pre", lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True):
        module(input=torch.zeros(2))
    module(torch.zeros(2))
    assert [list(kwargs) for kwargs in seen] == [["input"]]


def test_entries_of_registries_and_lists() -> None:
    registry: UserDict[str, int] = UserDict(a=1)
    handle = put_on(registry, "a", 2)
    put_on(registry, "b", 3).undo()
    assert dict(registry) == {"a": 2}
    handle.undo()
    assert dict(registry) == {"a": 1}
    values = ["theirs"]
    first = append_entry(values, "ours")
    append_entry(values, "ours").undo()
    assert values == ["theirs", "ours"]
    first.undo()
    first.undo()
    assert values == ["theirs"]


def test_an_enum_takes_one_more_member_and_loses_it_again() -> None:
    before = list(Colour), dict(Colour._member_map_), dict(Colour._value2member_map_)
    handle = enum_member(Colour, "BLUE")
    blue: Any = Colour("BLUE")
    assert blue is Colour["BLUE"] is getattr(Colour, "BLUE", None) and list(Colour) == [Colour.RED, blue]
    assert (blue.name, blue.value, blue == "BLUE", isinstance(blue, Colour)) == ("BLUE", "BLUE", True, True)
    handle.undo()
    assert before == (list(Colour), dict(Colour._member_map_), dict(Colour._value2member_map_))
    assert not hasattr(Colour, "BLUE")


def test_an_error_in_the_block_undoes_as_well() -> None:
    owner = Owner()
    with pytest.raises(ZeroDivisionError), Patches() as patches:
        patches.add(put_on(owner, "kept", "ours"), put_on(owner, "more", "ours"))
        raise ZeroDivisionError
    assert state_of(owner) == {}


class Holder(nn.Linear):
    """A module that holds the handles of what is changed in it, as a model with a prior does."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.patches: Handle = Patches(put_on(self, "note", "ours"), hook(self, "forward", touch))


def touch(*_: Any) -> None:
    return None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])  # noqa: S301 (of our own)
def test_a_copy_undoes_its_own_changes(again: Callable[[Holder], Holder]) -> None:
    holder = Holder()
    copied = again(holder)
    copied.patches.undo()
    assert "note" not in vars(copied) and not copied._forward_hooks
    assert holder.note == "ours" and len(holder._forward_hooks) == 1


def test_what_an_object_carries_lives_and_dies_with_it() -> None:
    owner = Owner()
    carry(owner, "state", 1)
    assert state_of(owner) == {"state": 1}


def test_a_snapshot_puts_a_model_back() -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    weight = root[0].weight
    value = weight.detach().clone()
    before = Snapshot(root, [weight])
    hook(root, "forward", touch)
    replace_module(root, "0", nn.ReLU())
    weight.requires_grad_(False)
    weight.data.zero_()
    before.restore()
    assert root[0].weight is weight and weight.requires_grad and not root._forward_hooks
    assert torch.equal(weight, value)
