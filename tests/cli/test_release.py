"""``edgepatch release``: what a release says of itself, and figures of no other patch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from edgepatch.cli import app
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch, write_patch


@pytest.fixture
def trained(tiny_patch, tmp_path):
    write_patch(tiny_patch, tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


def results_of(patch, path):
    cells = [{"runtime": "torch", "quantization": "F32", "patched": True, "emt": 0.5}]
    document = {
        "created": "2026-11-21T10:00:00Z",
        "patch": {"digest": patch.digest},
        "cells": cells,
        "retention": [],
        "examples": ["text"],
    }
    path.write_text(json.dumps(document))
    return path


def release(*arguments):
    return CliRunner().invoke(app, ["release", *map(str, arguments)], catch_exceptions=True)


def test_a_release_says_what_it_is_and_what_was_measured(trained, tiny_patch, tmp_path):
    out, results = tmp_path / "1.1.0.safetensors", results_of(tiny_patch, tmp_path / "results.json")
    done = release(
        trained,
        "-o",
        out,
        "--version",
        "1.1.0",
        "--sequence",
        7,
        "--channel",
        "beta",
        "--expires",
        "2027-11-21T10:00:00Z",
        "--results",
        results,
        "--supersedes",
        trained,
        "--json",
    )
    assert done.exit_code == 0, done.output
    released = read_patch(out)
    assert (released.version, released.sequence, released.channel, released.expires) == (
        "1.1.0",
        7,
        "beta",
        "2027-11-21T10:00:00Z",
    )
    assert released.supersedes == (tiny_patch.digest,) and json.loads(done.output)["digest"] == released.digest
    assert released.evaluation["cells"][0]["emt"] == 0.5 and released.evaluation["measured_digest"] == tiny_patch.digest
    assert "examples" not in released.evaluation, "evaluation prompts do not travel with a patch"
    assert released.kv_seed is not None and released.signatures == ()


def test_figures_of_another_patch_are_refused(trained, tiny_patch, tmp_path):
    results = results_of(replace(tiny_patch, name="other"), tmp_path / "results.json")
    done = release(trained, "-o", tmp_path / "x", "--results", results)
    assert isinstance(done.exception, InputError) and "measured with the patch" in str(done.exception)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"patch": 3}', "[" * 100_000])
def test_damaged_results_are_refused(trained, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    done = release(trained, "-o", tmp_path / "x", "--results", tmp_path / "results.json")
    assert isinstance(done.exception, InputError) and "results" in str(done.exception)
    assert "name a results.json" in done.exception.hint
