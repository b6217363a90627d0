"""Messages as frozen dataclasses: to plain msgpack values and, checked as coming from a hostile peer, back.

A record (NamedTuple) travels as a list, a message as a map. What a map holds beside the fields of its message is
ignored, and a field with a default may be missing: so newer and older members understand each other.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Self

MAX_TEXT = 8192
MAX_BYTES = 2**15
MAX_ITEMS = 2**12
_MAX_INT = 2**53

_Reader = Callable[[Any], Any]


class MessageError(ValueError):
    """What a peer sent is no such message; the text goes back to it."""


class Message:
    """Base of every message. Subclasses are frozen, slotted dataclasses of the types that `_reader` knows."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name, _, _ in _readers(type(self))}

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Raises MessageError."""
        if not isinstance(raw, dict):
            raise MessageError(f"{cls.__name__} must be a map")
        values = {}
        for name, read, is_required in _readers(cls):
            if name in raw:
                try:
                    values[name] = read(raw[name])
                except MessageError as error:
                    raise MessageError(f"{name} of {cls.__name__}: {error}") from None
            elif is_required:
                raise MessageError(f"{cls.__name__} lacks {name}")
        return cls(**values)


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS or value is None:
        return value
    if isinstance(value, Message):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


_known: dict[type[Message], tuple[tuple[str, _Reader, bool], ...]] = {}


def _readers(kind: type[Message]) -> tuple[tuple[str, _Reader, bool], ...]:
    if kind not in _known:
        _known[kind] = _make_readers(kind)
    return _known[kind]


def _make_readers(kind: type[Message]) -> tuple[tuple[str, _Reader, bool], ...]:
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return tuple(
        (field.name, _reader(hints[field.name]), field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    )


def _reader(hint: Any) -> _Reader:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _optional(_reader(next(part for part in parts if part is not types.NoneType)))
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return _sequence(_reader(parts[0]))
        return functools.partial(_record, tuple, tuple(map(_reader, parts)))
    if origin is dict:
        return _mapping(_reader(parts[1]))
    if origin is typing.Literal:
        return _one_of(parts)
    if isinstance(hint, type) and issubclass(hint, Message):
        return hint.from_dict
    if isinstance(hint, type) and issubclass(hint, tuple):
        readers = tuple(map(_reader, typing.get_type_hints(hint).values()))
        return functools.partial(_record, hint._make, readers)  # type: ignore[attr-defined]
    return _SCALARS[hint]


def _optional(read: _Reader) -> _Reader:
    return lambda value: None if value is None else read(value)


def _sequence(read: _Reader) -> _Reader:
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
            raise MessageError(f"it must be a list of at most {MAX_ITEMS}")
        return tuple(map(read, value))

    return read_all


def _mapping(read: _Reader) -> _Reader:
    def read_all(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise MessageError(f"it must be a map of at most {MAX_ITEMS}")
        return {_text(key): read(part) for key, part in value.items()}

    return read_all


def _one_of(choices: tuple[Any, ...]) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise MessageError(f"it must be one of {', '.join(choices)}")
        return value

    return read


def _record(make: Callable[[Any], Any], readers: tuple[_Reader, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != len(readers):
        raise MessageError(f"it must be a list of {len(readers)}")
    return make(read(part) for read, part in zip(readers, value, strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise MessageError(f"it must be a text of at most {MAX_TEXT} characters")
    return value


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) > MAX_BYTES:
        raise MessageError(f"it must be at most {MAX_BYTES} bytes")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise MessageError("it must be a whole number that is not negative")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise MessageError("it must be a number that is not negative")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MessageError("it must be true or false")
    return value


_SCALARS: dict[Any, _Reader] = {str: _text, bytes: _bytes, int: _integer, float: _number, bool: _truth}
