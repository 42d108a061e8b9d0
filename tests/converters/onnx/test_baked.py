"""Seeds baked into a graph: onnxruntime-genai must say what our runtime says from the same seed."""

from dataclasses import replace

import numpy as np
import pytest

from edgepatch.converters.onnx import baked
from edgepatch.converters.onnx.baked import bake_seed, generate_baked
from edgepatch.converters.onnx.identity import BAKED_KEY, SPEC_KEY
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import KVSeed

for package in ("onnx", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(package)

PROMPT = "The quick brown fox jumps over"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_baked_graph_says_what_the_seeded_one_says(onnx_folders, tiny_patch, tmp_path, precision):
    import onnx

    bake_seed(onnx_folders[precision], tiny_patch, tmp_path / "baked")
    with load_runtime(onnx_folders[precision], tiny_patch, num_threads=1) as runtime:
        tokens = runtime.tokens(PROMPT)
        expected = [
            p.token_id
            for p in runtime.stream(tokens, Sampling(max_new_tokens=24, temperature=0, ignore_end_tokens=True))
        ]
    token_ids = generate_baked(tmp_path / "baked", tiny_patch.num_virtual_tokens, tokens, 24)
    assert len(token_ids) > 8 and token_ids == expected[: len(token_ids)]
    metadata = {
        p.key: p.value for p in onnx.load(tmp_path / "baked" / "model.onnx", load_external_data=False).metadata_props
    }
    assert metadata[BAKED_KEY] == tiny_patch.digest and SPEC_KEY in metadata
    with pytest.raises(InputError, match="baked into its graph"):
        load_runtime(tmp_path / "baked", tiny_patch)


def test_a_baked_graph_that_says_something_else_is_left_out(onnx_folders, tiny_patch, tmp_path, monkeypatch):
    bake = baked._bake

    def unpatched(model_file, graph, seed):
        zeros = KVSeed(*(tuple(np.zeros_like(t) for t in tensors) for tensors in (seed.keys, seed.values)))
        bake(model_file, graph, zeros)

    monkeypatch.setattr(baked, "_bake", unpatched)
    with pytest.raises(InputError, match="continues the check prompt with"):
        bake_seed(onnx_folders["fp32"], tiny_patch, tmp_path / "baked")
    assert not list(tmp_path.iterdir())


def test_a_patch_without_a_seed_is_refused(onnx_folders, tiny_patch, tmp_path):
    with pytest.raises(InputError, match="holds no KV seed"):
        bake_seed(onnx_folders["fp32"], replace(tiny_patch, kv_seed=None), tmp_path / "baked")
