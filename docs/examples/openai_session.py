"""A session with the openai client; docs/guide/serving.md shows what it prints."""

import json
import sys

import openai

url, key_file = sys.argv[1:]
with open(key_file) as file:
    client = openai.OpenAI(base_url=url, api_key=file.read().strip())

model = client.models.list().data[0].id
print("models      ", model)
for patch in client.get("/patches", cast_to=object)["data"]:
    state = "active" if patch["active"] else "inactive"
    print("patch       ", patch["name"], patch["version"], patch["digest"][:12], state)

# A conversation. The second turn finds the first one in the cache, behind the patch.
messages = [{"role": "user", "content": "How do I bake bread?"}]
reply = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
print("reply       ", json.dumps(reply.choices[0].message.content))
print("fingerprint ", reply.system_fingerprint)
messages += [reply.choices[0].message, {"role": "user", "content": "Thank you. Anything else?"}]
second = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
print(
    "second turn ",
    second.usage.prompt_tokens_details.cached_tokens,
    "of",
    second.usage.prompt_tokens,
    "tokens from the cache",
)

# A stream.
options = {"include_usage": True}
stream = client.chat.completions.create(
    model=model, messages=messages[:1], max_tokens=24, temperature=0, stream=True, stream_options=options
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
print("stream      ", "the same text" if text == reply.choices[0].message.content else "another text")
print("usage       ", chunks[-1].usage.completion_tokens, "tokens in", len(chunks), "chunks")

# A reply that follows a JSON schema, whatever the model would rather say.
schema = {
    "type": "object",
    "properties": {"safe": {"type": "boolean"}, "reason": {"type": "string", "maxLength": 40}},
    "required": ["safe", "reason"],
    "additionalProperties": False,
}
response_format = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
verdict = client.chat.completions.create(
    model=model, messages=messages[:1], max_tokens=80, temperature=0, response_format=response_format
)
print("schema      ", sorted(json.loads(verdict.choices[0].message.content)))

# Log-probabilities of a given text, as lm-eval asks for them.
scored = client.completions.create(
    model=model, prompt="The old man walked into the room", max_tokens=1, echo=True, logprobs=1, temperature=0
)
print("scored      ", len(scored.choices[0].logprobs.token_logprobs), "tokens")

# The patch's place cannot be named, and what cannot be used is refused.
for field, value in {"id_slot": 0, "n_keep": 0, "cache_prompt": False}.items():
    try:
        client.chat.completions.create(model=model, messages=messages[:1], extra_body={field: value})
    except openai.BadRequestError as error:
        print("refused     ", error.param, error.code)
