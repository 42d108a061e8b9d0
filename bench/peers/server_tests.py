"""The peer's own server tests, run as they are on ``edgepatch serve`` behind the proxy of ``adapter``: one row a test function."""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepatch.bench.checkout import ROOT
from edgepatch.bench.peers import adapter
from edgepatch.bench.peers.rows import Row, Verdict
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import run_program

LAB = ROOT / "bench" / "lab" / "model"
TESTS = Path("tools") / "server" / "tests"
DEADLINE_S = 7200
Known = Mapping[str, tuple[Verdict, str]]

CACHE = "no field or path reaches the cache, because the patch lies there"
NO_PATH = "there is no such path here: OpenAI's interface has none"
OWN_FIELD = "a field of llama-server's own, which is refused as unknown, because it might change the answer unseen"
OWN_SHAPE = "compares with fields or words of llama-server's own"

FILES: Known = {
    "test_compat_anthropic": ("not_applicable", "another interface than OpenAI's"),
    "test_compat_gcp": ("not_applicable", "another interface than OpenAI's"),
    "test_embedding": ("not_applicable", "no embeddings; the 404 says so"),
    "test_infill": ("not_applicable", NO_PATH),
    "test_kv_keep_only_active": ("refused", CACHE),
    "test_lora": ("not_applicable", "no adapters"),
    "test_mcp_servers": ("not_applicable", "the server runs no tools"),
    "test_metrics": ("not_applicable", "metrics of other names; tests/server holds ours"),
    "test_proxy": ("not_applicable", "no proxy"),
    "test_rerank": ("not_applicable", "no embeddings; the 404 says so"),
    "test_router": ("not_applicable", "one server has one model, whose patch it has proven"),
    "test_sleep": ("not_applicable", "a server that has no work uses no processor, and keeps its model"),
    "test_slot_save": ("refused", CACHE),
    "test_speculative": ("not_applicable", "no draft models"),
    "test_stream": ("not_applicable", "streams that are resumed by a router"),
    "test_template": ("not_applicable", "reads prompts at /apply-template; the suite `templates` renders all of them"),
    "test_tokenize": ("not_applicable", NO_PATH),
    "test_tools_builtin": ("not_applicable", "the server runs no tools"),
    "test_vision_api": ("refused", "messages hold text only"),
}
"""Files that are not run, and why."""

SLOW: tuple[Verdict, str] = ("not_applicable", "marked slow there: needs models of gigabytes")
OWN_MODEL = "of the files or the token counts of llama.cpp's own model"
FOREIGN = "foreign pages are refused with status 403, where llama-server leaves the refusal to the browser"
BROKEN = ("did not come up", "500 ==", "(500,", "ConnectionError", "Timeout")
"""What is in the reason of a failure that nobody has foreseen, whatever the test."""

NOT_RUN: Known = {
    "test_basic::test_load_split_model": ("not_applicable", OWN_MODEL),
    "test_basic::test_server_model_aliases_and_tags": (
        "not_applicable",
        "a model has one name; requests to another are refused",
    ),
}
FUNCTIONS: Known = {
    "test_basic::test_server_multiple_addresses": ("not_applicable", "a server listens on one address"),
    "test_basic::test_server_props": ("not_applicable", NO_PATH),
    "test_basic::test_server_slots": ("refused", CACHE),
    "test_basic::test_no_ui": ("not_applicable", "the page at / is an option of llama-server's own"),
    "test_chat_completion::test_chat_completion_cached_tokens": ("not_applicable", OWN_MODEL),
    "test_chat_completion::test_chat_template": ("not_applicable", OWN_SHAPE),
    "test_chat_completion::test_chat_template_assistant_prefill": (
        "refused",
        "the last turn is continued by word, continue_final_message",
    ),
    "test_chat_completion::test_chat_template_continue_final_message_vllm_compat": ("not_applicable", OWN_SHAPE),
    "test_chat_completion::test_apply_chat_template": ("not_applicable", NO_PATH),
    "test_chat_completion::test_completion_with_json_schema": ("refused", OWN_FIELD),
    "test_chat_completion::test_invalid_chat_completion_req": (
        "refused",
        "two turns of the assistant at the end are two closed turns here",
    ),
    "test_chat_completion::test_chat_completion_with_timings_per_token": ("refused", OWN_FIELD),
    "test_chat_completion::test_logit_bias": ("not_applicable", NO_PATH),
    "test_chat_completion::test_context_size_exceeded": (
        "refused",
        "the error has OpenAI's type, and the code context_length_exceeded",
    ),
    "test_chat_completion::test_context_size_exceeded_stream": (
        "refused",
        "the error has OpenAI's type, and the code context_length_exceeded",
    ),
    "test_chat_completion::test_return_progress": ("refused", OWN_FIELD),
    "test_chat_completion::test_chat_completions_multiple_choices": ("refused", CACHE),
    "test_chat_completion::test_chat_completions_token_count": ("not_applicable", NO_PATH),
    "test_chat_completion::test_verbose_debug": ("refused", OWN_FIELD),
    "test_completion::test_completion": ("refused", OWN_FIELD),
    "test_completion::test_completion_stream": ("not_applicable", OWN_SHAPE),
    "test_completion::test_consistent_result_same_seed": ("refused", CACHE),
    "test_completion::test_different_result_different_seed": ("refused", CACHE),
    "test_completion::test_consistent_result_different_batch_size": ("refused", CACHE),
    "test_completion::test_cache_vs_nocache_prompt": ("not_applicable", "skipped there: fails on Linux"),
    "test_completion::test_json_prompt_no_mtmd": ("refused", OWN_FIELD),
    "test_completion::test_completion_with_tokens_input": ("not_applicable", NO_PATH),
    "test_completion::test_completion_response_fields": ("refused", OWN_FIELD),
    "test_completion::test_n_probs": ("refused", OWN_FIELD),
    "test_completion::test_n_probs_stream": ("refused", OWN_FIELD),
    "test_completion::test_n_probs_post_sampling": ("refused", OWN_FIELD),
    "test_completion::test_n_probs_post_backend_sampling": ("refused", OWN_FIELD),
    "test_completion::test_logit_bias": ("refused", OWN_FIELD),
    "test_completion::test_cancel_request": (
        "refused",
        "slots are not shown; tests/server holds that a cancelled reply frees its own",
    ),
    "test_completion::test_completion_prompt_cache": ("not_applicable", OWN_SHAPE),
    "test_compat_oai_responses::test_responses_stream_with_llama_telemetry": ("refused", OWN_FIELD),
    "test_ctx_shift::test_ctx_shift_disabled_long_prompt": ("not_applicable", OWN_MODEL),
    "test_ctx_shift::test_ctx_shift_disabled_short_prompt": ("not_applicable", OWN_MODEL),
    "test_ctx_shift::test_ctx_shift_enabled": ("refused", "a full context ends the reply; nothing is shifted"),
    "test_ignore_eos::test_ignore_eos_populates_logit_bias": ("refused", OWN_FIELD),
    "test_ignore_eos::test_ignore_eos_false_no_logit_bias": ("refused", OWN_FIELD),
    "test_security::test_access_static_assets_without_api_key": (
        "not_applicable",
        "a web interface of llama-server's own",
    ),
    "test_security::test_correct_api_key_anthropic_header": ("not_applicable", "another interface than OpenAI's"),
    "test_security::test_cors_options": ("refused", "pages of other hosts are let in by name, with --allow-origin"),
    "test_security::test_cors_origins_defaults_to_localhost_with_tools_enabled": ("refused", FOREIGN),
    "test_security::test_cors_origins_localhost_rejects": ("refused", FOREIGN),
    "test_security::test_cors_proxy_only_forwards_explicit_proxy_headers": ("not_applicable", "no proxy"),
    "test_security::test_local_media_file": ("refused", "messages hold text only"),
}
"""Tests that are run, and why they do not pass."""


def rows(root: Path) -> Iterator[Row]:
    """One row a test function.

    Args:
        root: of llama.cpp's sources.

    Raises:
        InputError: it holds no tests of the server.
        EdgepatchError: they cannot be run.
    """
    folder = root / TESTS
    files = sorted((folder / "unit").glob("test_*.py"))
    if not files:
        raise InputError(f"{folder}: expected the tests of llama-server, found none", hint="unpack the archive anew")
    outcomes = _run(folder, [file for file in files if file.stem not in FILES])
    for file in files:
        for function in _functions(file):
            name = f"{file.stem}::{function}"
            left_out = FILES.get(file.stem) or NOT_RUN.get(name)
            yield Row("server", name, *_judged(name, left_out, outcomes.get(name)))


def _judged(name: str, left_out: tuple[Verdict, str] | None, outcomes: list[str] | None) -> tuple[Verdict, str]:
    if left_out is not None:
        return left_out
    if outcomes is None:
        return SLOW
    reasons = [reason for reason in outcomes if reason]
    broken = next((reason for reason in reasons if any(sign in reason for sign in BROKEN)), "")
    if broken or not reasons:
        return ("fail", _without_folders(broken)[:300]) if broken else ("pass", "")
    return FUNCTIONS.get(name, ("fail", _without_folders(reasons[0])[:300]))


def _without_folders(reason: str) -> str:
    """A reason without the folders of the machine that it was found on."""
    return re.sub(r"/\S+/(?=(?:unit|edgepatch)/)", "", reason)


def _functions(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def _run(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """Name -> for each of its parameters why it failed, "" where it passed."""
    from edgepatch.converters.gguf.writer import convert_folder
    from edgepatch.runtimes import load_runtime

    with tempfile.TemporaryDirectory() as work:
        model, report = Path(work) / "lab.gguf", Path(work) / "report.jsonl"
        convert_folder(LAB / "base", model, "F16")
        with load_runtime(model, None) as session:
            ends = json.dumps(sorted(session.end_token_ids))
        patch = LAB / "lab-detox-0.1.0.safetensors"
        variables = {
            adapter.MODEL: str(model),
            adapter.PATCH: str(patch),
            adapter.REPORT: str(report),
            adapter.ENDS: ends,
        }
        options = ["-q", "-m", "not slow", "-p", adapter.__name__, "-p", "no:cacheprovider"]
        ended = run_program(
            [sys.executable, "-m", "pytest", *options, *(f"unit/{file.name}" for file in files)],
            deadline_s=DEADLINE_S,
            environment=variables,
            folder=folder,
        )
        if not report.is_file():
            raise EdgepatchError(f"the peer's tests {ended.failure or 'ran none'}")
        return _read(report.read_text(encoding="utf-8"))


def _read(report: str) -> dict[str, list[str]]:
    outcomes: dict[str, list[str]] = defaultdict(list)
    for row in map(_parsed, report.splitlines()):
        name = row["test"].removeprefix("unit/").replace(".py::", "::").partition("[")[0]
        outcomes[name].append("" if row["outcome"] == "passed" else row["reason"] or row["outcome"])
    return dict(outcomes)


def _parsed(line: str) -> Any:
    return json.loads(line)
