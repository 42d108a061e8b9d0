"""JSON Schemas of requests and replies. The request schemas are closed: a field that is not here is refused.

No field names a place in the cache, and none ever may: the patch lies in front of everything a client can address.
"""

from __future__ import annotations

from typing import Any

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
INT32 = 2**31 - 1


def _object(properties: dict[str, Any], required: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or null, which is the same as leaving the field out."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **more, "type": [schema["type"], "null"]}


def _number(least: float, most: float, description: str = "") -> dict[str, Any]:
    return _optional({"type": "number", "minimum": least, "maximum": most, "description": description})


def _integer(least: int, most: int, description: str = "") -> dict[str, Any]:
    return _optional({"type": "integer", "minimum": least, "maximum": most, "description": description})


TEXT = {"type": "string"}
FLAG = _optional({"type": "boolean"})
NAME = {"type": "string", "minLength": 1, "maxLength": 256}
TOKEN_IDS = {
    "type": "array",
    "minItems": 1,
    "maxItems": 2**18,
    "items": {"type": "integer", "minimum": 0, "maximum": INT32},
}

# Requests.

TEXT_PART = _object({"type": {"const": "text"}, "text": TEXT}, ("type", "text"))
CONTENT = {"anyOf": [TEXT, {"type": "array", "minItems": 1, "maxItems": 1024, "items": TEXT_PART}]}
TOOL_CALL = _object(
    {
        "id": NAME,
        "type": {"const": "function"},
        "function": _object(
            {"name": NAME, "arguments": {**TEXT, "description": "A JSON object as text."}}, ("name", "arguments")
        ),
    },
    ("id", "type", "function"),
)


def _message(role: str, **more: Any) -> dict[str, Any]:
    properties = {"role": {"const": role}, "content": CONTENT, "name": _optional(NAME), **more}
    required = [name for name in ("role", "content", "tool_call_id") if name in properties]
    return _object(properties, tuple(r for r in required if role != "assistant" or r == "role"))


MESSAGE = {
    "anyOf": [
        _message("system"),
        _message("developer"),  # OpenAI's newer word for "system"
        _message("user"),
        _message(
            "assistant",
            content=_optional(CONTENT),
            tool_calls=_optional({"type": "array", "minItems": 1, "maxItems": 128, "items": TOOL_CALL}),
            refusal={"type": "null"},
        ),
        _message("tool", tool_call_id=NAME),
    ]
}
TOOL = _object(
    {
        "type": {"const": "function"},
        "function": _object(
            {
                "name": {"type": "string", "pattern": r"^[A-Za-z0-9_-]{1,64}$"},
                "description": _optional(TEXT),
                "parameters": _optional({"type": "object"}),
                "strict": FLAG,
            },
            ("name",),
        ),
    },
    ("type", "function"),
)
JSON_SCHEMA_FORMAT = _object(
    {"name": NAME, "description": _optional(TEXT), "schema": {"type": "object"}, "strict": FLAG}, ("name", "schema")
)
RESPONSE_FORMAT = {
    "anyOf": [
        _object({"type": {"const": "text"}}, ("type",)),
        _object({"type": {"const": "json_object"}}, ("type",)),
        _object({"type": {"const": "json_schema"}, "json_schema": JSON_SCHEMA_FORMAT}, ("type", "json_schema")),
    ]
}
STOP = {"anyOf": [NAME, {"type": "array", "maxItems": 16, "items": NAME}]}

SAMPLING_FIELDS: dict[str, Any] = {
    "temperature": _number(0, 2, "0 takes the most likely token. Default 1."),
    "top_p": _optional({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": _integer(0, INT32, "Extension: keep the k likeliest tokens; 0 keeps all."),
    "min_p": _number(0, 1, "Extension: keep tokens of at least this share of the likeliest one's probability."),
    "repetition_penalty": _optional(
        {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 2,
            "description": "Extension: above 1 makes repeated tokens less likely.",
        }
    ),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _optional(
        {
            "type": "object",
            "propertyNames": {"pattern": r"^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 1024,
        }
    ),
    "seed": _integer(-(2**63), 2**63 - 1, "Makes the draw repeatable."),
    "stop": _optional(STOP),
    "n": _integer(1, MAX_CHOICES),
    "response_format": _optional(RESPONSE_FORMAT),
    "grammar": _optional(
        {"type": "string", "minLength": 1, "maxLength": 65536, "description": "Extension: a grammar the reply follows."}
    ),
    "stream": FLAG,
    "stream_options": _optional(_object({"include_usage": FLAG})),
    "user": _optional({"type": "string", "maxLength": 1024, "description": "Accepted and not used."}),
}

CHAT_REQUEST = _object(
    {
        "model": NAME,
        "messages": {"type": "array", "minItems": 1, "maxItems": 4096, "items": MESSAGE},
        "max_tokens": _integer(1, INT32, "Default: as many as the context holds."),
        "max_completion_tokens": _integer(1, INT32, "The same as max_tokens."),
        "logprobs": FLAG,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "tools": _optional({"type": "array", "minItems": 1, "maxItems": 128, "items": TOOL}),
        "tool_choice": _optional({"type": "string", "enum": ["auto", "none"]}),
        **SAMPLING_FIELDS,
    },
    ("model", "messages"),
)
COMPLETION_REQUEST = _object(
    {
        "model": NAME,
        "prompt": {
            "description": "Text, token ids, or a list of either. No chat template is applied.",
            "anyOf": [
                {"type": "string", "minLength": 1},
                TOKEN_IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": TOKEN_IDS},
            ],
        },
        "max_tokens": _integer(0, INT32, "Default 16; 0 only with echo."),
        "logprobs": _integer(0, MAX_LOGPROBS),
        "echo": _optional(
            {"type": "boolean", "description": "Put the prompt, and its logprobs if asked for, in front of the reply."}
        ),
        **SAMPLING_FIELDS,
    },
    ("model", "prompt"),
)

# Replies.

COUNT = {"type": "integer", "minimum": 0}
FINISH_REASON = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", None]}
USAGE = _object(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": _object({"cached_tokens": COUNT}, ("cached_tokens",)),
    },
    ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"),
)


def _token_logprob(**more: Any) -> dict[str, Any]:
    values = {"token": TEXT, "logprob": {"type": "number"}, "bytes": {"type": "array", "items": COUNT}, **more}
    return _object(values, tuple(values))


CHAT_LOGPROBS = _object(
    {"content": {"type": "array", "items": _token_logprob(top_logprobs={"type": "array", "items": _token_logprob()})}},
    ("content",),
)
REPLY_TOOL_CALL = _object({**TOOL_CALL["properties"], "index": COUNT}, ("id", "type", "function"))
REPLY_MESSAGE = _object(
    {
        "role": {"const": "assistant"},
        "content": {"type": ["string", "null"]},
        "tool_calls": {"type": "array", "items": REPLY_TOOL_CALL},
    },
    ("role", "content"),
)
COMPLETION_LOGPROBS = _object(
    {
        "tokens": {"type": "array", "items": TEXT},
        "token_logprobs": {"type": "array", "items": {"type": ["number", "null"]}},
        "top_logprobs": {
            "type": "array",
            "items": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
        },
        "text_offset": {"type": "array", "items": COUNT},
    },
    ("tokens", "token_logprobs", "top_logprobs", "text_offset"),
)
DELTA = {**REPLY_MESSAGE, "required": []}


def _reply(kind: str, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    properties = {
        "id": TEXT,
        "object": {"const": kind},
        "created": COUNT,
        "model": TEXT,
        "system_fingerprint": {"type": "string", "pattern": "^[0-9a-f]{12}[+]([0-9a-f]{12}|bare)$"},
        "choices": {
            "type": "array",
            "items": _object({"index": COUNT, "finish_reason": FINISH_REASON, **choice}, ("index", *choice)),
        },
        **more,
    }
    return _object(properties, tuple(properties))


def _chunk(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    reply = _reply(kind, choice, usage=_optional(USAGE))
    return {**reply, "required": [name for name in reply["required"] if name != "usage"]}


CHAT_REPLY = _reply("chat.completion", {"message": REPLY_MESSAGE, "logprobs": _optional(CHAT_LOGPROBS)}, usage=USAGE)
CHAT_CHUNK = _chunk("chat.completion.chunk", {"delta": DELTA, "logprobs": _optional(CHAT_LOGPROBS)})
COMPLETION_REPLY = _reply("text_completion", {"text": TEXT, "logprobs": _optional(COMPLETION_LOGPROBS)}, usage=USAGE)
COMPLETION_CHUNK = _chunk("text_completion", {"text": TEXT, "logprobs": _optional(COMPLETION_LOGPROBS)})
ERROR = _object(
    {
        "error": _object(
            {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            ("message", "type", "param", "code"),
        )
    },
    ("error",),
)
MODEL = _object(
    {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT},
    ("id", "object", "created", "owned_by"),
)
PATCH = _object(
    {
        "object": {"const": "patch"},
        "name": TEXT,
        "version": TEXT,
        "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "num_virtual_tokens": COUNT,
        "active": {"type": "boolean"},
        "seed_route": TEXT,
    },
    ("object", "name", "version", "digest", "num_virtual_tokens", "active", "seed_route"),
)


def _listing(item: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": item}, **more}, ("object", "data", *more)
    )


MODELS = _listing(MODEL)
PATCHES = _listing(PATCH, system_fingerprint=TEXT)
HEALTH = _object(
    {
        "status": {"type": "string", "enum": ["loading", "ok", "stopping", "failed"]},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
    ("status",),
)
