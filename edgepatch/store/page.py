"""The state of a device's store as one HTML file, for an administrator who wants a page to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepatch.files.writing import write_atomically
from edgepatch.pages.blocks import Facts, Page, Section, listing
from edgepatch.pages.rendering import render
from edgepatch.store.audit import Finding

SHORT = 12  # digits of a digest
WHY = ("unsigned", "downgrade", "expired", "reason")


def write_status_page(
    report: Mapping[str, Any], findings: Sequence[Finding], history: Sequence[Mapping[str, Any]], time: str, path: Path
) -> None:
    """Writes the page.

    Args:
        report: of ``audit.status``.
        findings: what needs attention.
        history: entries of the store's history, oldest first.
        time: when the store was looked at, RFC 3339.
        path: the HTML file.

    Raises:
        InputError: the file cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    problems = [{"level": one.level, "subject": one.subject, "message": one.message} for one in findings]
    sections = [
        Section("Device", [Facts(_device(report, time))]),
        Section(
            "Needs attention", [listing("", problems, {name: name for name in ("level", "subject", "message")}, 3)]
        ),
        *map(_base, report["bases"]),
        Section("History", [listing("Oldest first", [_entry(one) for one in history], _columns(*_entry({})), 6)]),
    ]
    count = sum(len(base["patches"]) for base in report["bases"])
    errors = sum(one.level == "error" for one in findings)
    heading = f"{count} active patch{'' if count == 1 else 'es'}, {errors or 'no'} error{'' if errors == 1 else 's'}"
    write_atomically(path, render(Page("Patches of this device", sections, heading, kicker=time)).encode())


def _columns(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _device(report: Mapping[str, Any], time: str) -> dict[str, Any]:
    root = report["trust_root"]
    trusted = f"version {root['version']}, {root['threshold']} of {', '.join(root['keys'])}" if root else "none"
    return {"store": report["store"], "looked at": time, "trust root": trusted}


def _base(base: Mapping[str, Any]) -> Section:
    facts = {"base": base["base"][:SHORT], "weights": base["weight_fingerprint"][:SHORT]}
    if base["held"]:
        facts["held"] = base["hold_reason"] or "yes"
    if base["composition"]:
        facts["together"] = (
            f"{base['composition']['digest'][:SHORT]}, {base['composition']['num_virtual_tokens']} virtual tokens"
        )
    if not base["patches"]:
        facts["active"] = "nothing: this model runs without a patch, by word"
    active = [_active(patch) for patch in base["patches"]]
    off = [{"patch": one["name"], "why": one["reason"] or "replaced", "held": _held(one)} for one in base["off"]]
    names = _columns("patch", "digest", "release", "expires", "signatures", "held")
    tables = [listing("Active", active, names, 6), listing("Off", off, _columns("patch", "why", "held"), 3)]
    return Section(base["name"] or base["shape"], [Facts(facts), *tables])


def _active(patch: Mapping[str, Any]) -> dict[str, str]:
    return {
        "patch": f"{patch['name']} {patch['version']}",
        "digest": patch["digest"],
        "release": f"{patch['channel']} {patch['sequence']}",
        "expires": patch["expires"] or "never",
        "signatures": patch["signatures"],
        "held": _held(patch),
    }


def _held(entry: Mapping[str, Any]) -> str:
    return (entry["hold_reason"] or "yes") if entry["held"] else "no"


def _entry(entry: Mapping[str, Any]) -> dict[str, str]:
    patch = f"{entry['name']} {entry['version']}" if "patch" in entry else entry.get("name", "")
    return {
        "number": str(entry.get("number", "")),
        "time": entry.get("time", ""),
        "action": entry.get("action", ""),
        "patch": patch,
        "digest": str(entry.get("patch") or entry.get("fingerprint") or "")[:SHORT],
        "why": "; ".join(f"{name}: {entry[name]}" for name in WHY if name in entry),
    }
