"""What the models of requests have in common: they are closed and strict, and say what they expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edgepatch.server.schemas.limits import EMPTY_VALUES
from edgepatch.text.messages import texts_in


def problem(kind: str, expected: str, **context: str) -> PydanticCustomError:
    """A problem that pydantic has no check for; `edgepatch.server.schemas.validation` puts its sentence together."""
    # pydantic cannot carry halves of characters, which a field's name may hold.
    safe = {name: text.encode("utf-8", "backslashreplace").decode("utf-8") for name, text in context.items()}
    return PydanticCustomError(kind, expected, safe)


class RequestModel(BaseModel):
    """An object in a request. What a client adds is looked for first, so that many unknown fields are no more work than one."""

    # Built by `build_models`, which the server calls while the model loads, or at the first use. What a client's library sends back
    # with a conversation may hold fields without a value, whatever their names: where `ignores_empty`, those are left out.
    ignores_empty: ClassVar[bool] = False
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _require_known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names, tag_fields = _fields_of(cls)
        for name, tags in tag_fields.items():
            # A wrong tag says that another kind of object was meant, whose fields are no surprise then.
            if name in value and value[name] not in tags:
                raise problem(f"wrong_{name}", " or ".join(map(repr, tags)))
        unknown = next((name for name in value if name not in names and not cls._is_ignored(value[name])), None)
        if unknown is not None:
            raise problem("unknown_field", f"one of {', '.join(names)}", field=unknown)
        return {name: item for name, item in value.items() if name in names} if cls.ignores_empty else value

    @classmethod
    def _is_ignored(cls, item: object) -> bool:
        return cls.ignores_empty and item in EMPTY_VALUES


@cache
def _fields_of(model: type[RequestModel]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The names of an object's fields, and the values of those that tell it from other objects."""
    fields = model.model_fields
    tags = {
        name: get_args(field.annotation) for name, field in fields.items() if get_origin(field.annotation) is Literal
    }
    return tuple(field.alias or name for name, field in fields.items()), tags


def _require_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise problem("string_unicode", "valid Unicode") from None
    return text


def _require_unicode_throughout(value: Any) -> Any:
    for text in texts_in(value):
        _require_unicode(text)
    return value


def as_integer(value: object) -> object:
    """JSON has one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def by_shape(choose: Callable[[object], str | None], expected: str = "text or a list") -> Discriminator:
    """Alternatives that are told apart by what kind of value they are. Tags are in brackets, as no field's name is."""
    return Discriminator(choose, "wrong_shape", expected)


def by_tag(
    field: str,
    labels: Mapping[str, str],
    choose: Callable[[object], str | None] | None = None,
    remark: str = "",
) -> Discriminator:
    """Objects that are told apart by the value of one field.

    Args:
        field: its name.
        labels: its values, and the tags of the alternatives that have them.
        choose: gives the tag of an object, where the field may be missing.
        remark: why there are no others.
    """

    def by_field(value: object) -> str | None:
        tag = value.get(field) if isinstance(value, dict) else None
        return labels.get(tag) if isinstance(tag, str) else None

    expected = " or ".join(map(repr, labels)) + (f" ({remark})" if remark else "")
    return Discriminator(choose or by_field, f"wrong_{field}", expected)


class EchoedModel(RequestModel):
    """A part of a conversation, which clients' libraries send back as they got it."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": [None, "", [], {}]}})
    ignores_empty = True


WHOLE = BeforeValidator(as_integer)
Text = Annotated[str, AfterValidator(_require_unicode)]
FreeObject = Annotated[dict[str, Any], AfterValidator(_require_unicode_throughout)]
"""An object whose fields are the client's own, such as a schema."""

Unused = Annotated[Any, Field(description="Accepted and not used.")]


def _without_value(value: object) -> object:
    return None if value in EMPTY_VALUES else value


NoValue = Annotated[None, BeforeValidator(_without_value), WithJsonSchema({"enum": [None, "", [], {}]})]
"""A field that is known, and refused where it has a value."""
