"""F6: the attacks on an update, each with a file made for it, tried on a device that runs a genuine patch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.errors import EdgepatchError
from edgepatch.patch.file import PAYLOAD_TYPE, Patch, patch_bytes, signed
from edgepatch.store import audit
from edgepatch.store.device import Store
from edgepatch.store.policy import MAX_JUMP, Allowances
from edgepatch.tensors import ModelSpec, SoftPrompt
from edgepatch.trust.drafts import new_root
from edgepatch.trust.roots import Key
from edgepatch.trust.signatures import raw_public_key, sign

BASE = ModelSpec("llama", 8, 2, 1, 4, 32, 10000.0, "a" * 64, "b" * 64)
VENDOR, SITE, THIEF = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
ACTIVE = 5


def genuine(sequence: int, *keys: Ed25519PrivateKey, **fields: object) -> Patch:
    """A patch signed by some keys; by vendor and site where none are named."""
    prompt = SoftPrompt(np.full((2, BASE.hidden_size), sequence % 997 / 1024, np.float32))
    patch = replace(Patch("detox", "1.0.0", BASE, prompt, sequence=sequence), **fields)  # type: ignore[arg-type]
    for key in keys or (VENDOR, SITE):
        patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, key))
    return patch


class Device:
    """A device that runs patch 5, and takes patches of vendor and site together.

    Args:
        folder: of its store, and for the files of the attacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.time = folder, NOW
        self.store = Store(folder / "store", clock=lambda: self.time)
        keys = [Key(raw_public_key(key), owner) for key, owner in ((VENDOR, "vendor"), (SITE, "site"))]
        root = new_root(
            keys, keys[:1], created=NOW - timedelta(days=1), lifetime=timedelta(days=900), patch_threshold=2
        )
        self.store.set_root([root.signed_by(VENDOR)])
        self.store.apply(self.file(patch_bytes(genuine(ACTIVE, expires="2030-02-01T00:00:00Z"))))

    def file(self, data: bytes) -> Path:
        path = self.folder / "attack.safetensors"
        path.write_bytes(data)
        return path

    def refuses(self, data: bytes) -> bool:
        """Whether a file is refused, and the old patch runs on."""
        try:
            self.store.apply(self.file(data))
        except EdgepatchError as error:
            return error.exit_code in (3, 4) and self.runs()
        return False

    def runs(self) -> bool:
        """Whether the genuine patch is active, and loads."""
        return [patch.sequence for patch in self.store.active(BASE)] == [ACTIVE]


def _arbitrary(device: Device) -> bool:
    data = bytearray(patch_bytes(genuine(6)))
    bits = [number * 97 % (len(data) * 8) for number in range(64)]
    flipped = []
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        flipped.append(device.refuses(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
    return (
        all(flipped)
        and device.refuses(patch_bytes(genuine(6, THIEF)))
        and device.refuses(patch_bytes(replace(genuine(6), signatures=())))
    )


def _endless(device: Device) -> bool:
    path = device.file(b"")
    os.truncate(path, 10 * 2**30)
    try:
        device.store.apply(path)
    except EdgepatchError as error:
        return error.exit_code == 3 and device.runs()
    return False


def _fast_forward(device: Device) -> bool:
    return all(device.refuses(patch_bytes(genuine(sequence))) for sequence in (ACTIVE + MAX_JUMP + 1, 2**53 - 1))


def _freeze(device: Device) -> bool:
    """An expired patch is flagged and runs on; a clock that is set back does not make it young again."""
    device.time = NOW + timedelta(days=40)
    flagged = any("expired" in finding.message for finding in audit.status(device.store)[1])
    refused = device.refuses(patch_bytes(genuine(6, expires="2030-02-01T00:00:00Z")))
    device.store.hold()
    device.store.hold(is_held=False)
    device.time = NOW
    return flagged and refused and device.refuses(patch_bytes(genuine(6, expires="2030-02-01T00:00:00Z")))


def _mix_and_match(device: Device) -> bool:
    """Tensors, evaluation, signatures of one with the rest of another; another patch's file in the store."""
    one, two = genuine(6), genuine(7)
    mixed = [patch_bytes(one)[:-64] + patch_bytes(two)[-64:], patch_bytes(replace(one, signatures=two.signatures))]
    mixed.append(patch_bytes(replace(one, evaluation={"violations": 0})))
    mixed.append(patch_bytes(replace(one, soft_prompt=two.soft_prompt)))
    if not all(device.refuses(data) for data in mixed):
        return False
    path = device.store.patch_path(device.store.read()[0].bases[device.store.find_base(None)].active[0])
    kept = path.read_bytes()
    path.write_bytes(patch_bytes(one))
    try:
        device.store.active(BASE)
    except EdgepatchError as error:
        path.write_bytes(kept)
        return error.exit_code == 3
    return False


def _rollback(device: Device) -> bool:
    older = all(device.refuses(patch_bytes(genuine(sequence))) for sequence in range(1, ACTIVE))
    same = device.refuses(patch_bytes(genuine(ACTIVE, summary="another")))
    return older and same and device.refuses(patch_bytes(genuine(1, channel="beta")))


def _key_compromise(device: Device) -> bool:
    return all(device.refuses(patch_bytes(genuine(6, *keys))) for keys in ((VENDOR,), (SITE,), (VENDOR, THIEF)))


def _wrong_software(device: Device) -> bool:
    other = replace(BASE, rope_theta=5000.0, weight_fingerprint="c" * 64)
    try:
        device.store.apply(device.file(patch_bytes(genuine(6, base=other))))
    except EdgepatchError as error:
        return (
            error.exit_code == 4 and "rope_theta" in str(error) and "weight_fingerprint" in str(error) and device.runs()
        )
    return False


def _exemption(device: Device) -> bool:
    """A patch that was taken unsigned, on a trial, is not used once there is a trust root, and does not come back."""
    trial = Store(device.folder / "trial", clock=lambda: device.time)
    trial.apply(device.file(patch_bytes(genuine(6, THIEF))), Allowances(unsigned="trial"))
    trial.set_root([device.store.root()])  # type: ignore[list-item]
    if not _is_refused(lambda: trial.active(BASE)):
        return False
    trial.apply(device.file(patch_bytes(genuine(7))))
    return _is_refused(trial.rollback) and [patch.sequence for patch in trial.active(BASE)] == [7]


def _is_refused(use: Callable[[], object]) -> bool:
    try:
        use()
    except EdgepatchError as error:
        return error.exit_code == 3
    return False


ATTACKS: dict[str, Callable[[Device], bool]] = {
    "arbitrary installation": _arbitrary,
    "endless data": _endless,
    "fast-forward": _fast_forward,
    "freeze": _freeze,
    "mix-and-match": _mix_and_match,
    "rollback": _rollback,
    "key compromise": _key_compromise,
    "wrong software": _wrong_software,
    "exemption": _exemption,
}
"""Row of the list of attacks -> whether it is refused."""


def attempted(folder: Path) -> dict[str, bool]:
    """Every attack on a device of its own, and whether it was refused."""
    refused = {}
    for number, (name, attack) in enumerate(ATTACKS.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        refused[name] = attack(Device(place))
        shutil.rmtree(place)
    return refused
