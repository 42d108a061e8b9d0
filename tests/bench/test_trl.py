"""TRL as the oracle: our trainer's losses on a policy that moves, step for step."""

from __future__ import annotations

import numpy as np
import pytest

from edgepatch.bench.trl.arms import OwnArm, TrlArm, config_of, make_pairs
from edgepatch.tensors import SoftPrompt

pytest.importorskip("trl", reason="TRL is not installed (extra dev)")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, datasets and PEFT; their warnings are not ours to mend
STEPS, BATCH, P = 3, 4, 10
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def start(tiny_folder):
    """Not where training starts: the reference is the bare model, and this is far from it."""
    rng = np.random.default_rng(4)
    return SoftPrompt((rng.standard_normal((P, 256)) * 0.2).astype(np.float32))


@pytest.mark.parametrize(("stage", "reference"), [("SFT", "base"), ("DPO", "base"), ("DPO", "sft")])
def test_losses_are_those_of_trl(tiny_folder, start, tmp_path, stage, reference):
    config = config_of(stage, STEPS, P, BATCH, rate=0.05, reference=reference)
    ours = OwnArm(tiny_folder, stage, make_pairs(tiny_folder, 14), config, start)
    theirs = TrlArm(tiny_folder, stage, ours.plan(STEPS), config, start, tmp_path)
    policies = [start]
    course = ours.run(policies.append)
    expected = []
    for step in range(STEPS):
        theirs.put(policies[step])
        expected.append(theirs.loss(step))
    assert np.abs(np.array(course.losses) - expected).max() <= TOLERANCE
    assert np.ptp(expected) > 100 * TOLERANCE, "the policy moves"
    if reference == "sft":
        assert expected[0] == pytest.approx(np.log(2), abs=1e-6), "the frozen patch is its own reference"
        assert abs(expected[-1] - np.log(2)) > 1e-3


@pytest.mark.parametrize("stage", ["SFT", "DPO"])
def test_a_whole_run_goes_the_same_way(tiny_folder, start, tmp_path, stage):
    config = config_of(stage, STEPS, P, BATCH, rate=0.01)
    ours = OwnArm(tiny_folder, stage, make_pairs(tiny_folder, 14), config, start)
    theirs = TrlArm(tiny_folder, stage, ours.plan(STEPS), config, start, tmp_path)
    assert ours.run().losses == pytest.approx(theirs.run().losses, abs=1e-4)
