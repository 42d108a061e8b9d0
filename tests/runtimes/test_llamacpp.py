"""The llama.cpp runtime against Transformers fed ``inputs_embeds``; the seed stays whatever a caller does."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.llamacpp import layout as llamacpp_layout
from edgepatch.converters.llamacpp import state as llamacpp_state
from edgepatch.converters.llamacpp.layout import Layout
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError, MismatchError, PatchFormatError
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.calibration import Calibration
from edgepatch.tensors import SoftPrompt

PROMPT = "The quick brown fox jumps over"
OTHER = "<b>Numbers</b> 1234 and something else"
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def f32_file(tiny_ggufs):
    return tiny_ggufs["F32"]


def load(path, patch, exact=True, **options):
    """``exact`` is full precision throughout; llama.cpp's flash attention computes in float16."""
    precision = {"kv_type": "f32", "flash_attention": False} if exact else {}
    return load_runtime(path, patch, num_threads=1, **(precision | options))


@pytest.fixture(scope="module")
def runtime(f32_file, tiny_patch):
    with load(f32_file, tiny_patch) as loaded:
        yield loaded


def kl(expected, actual):
    """Mean KL divergence over tokens of two (T, V) logits."""
    p, q = (
        x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected.astype(np.float64), actual.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_seeded_logits_equal_inputs_embeds(runtime, oracle, tiny_patch):
    tokens = runtime.tokens(PROMPT)
    assert runtime.seed_route == "stored"
    assert np.abs(runtime.logits(PROMPT) - oracle(tokens, tiny_patch.soft_prompt)).max() <= 5e-5


def test_bare_logits_equal_inputs_embeds(f32_file, oracle):
    with load(f32_file, None) as runtime:
        tokens = runtime.tokens(PROMPT)
        assert np.abs(runtime.logits(tokens) - oracle(tokens, None)).max() <= 5e-5


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_half_precision_attention_stays_close(f32_file, oracle, tiny_patch, flash_attention, kv_type):
    with load(f32_file, tiny_patch, kv_type=kv_type, flash_attention=flash_attention) as runtime:
        tokens = runtime.tokens(PROMPT)
        expected, actual = oracle(tokens, tiny_patch.soft_prompt), runtime.logits(tokens)
    exact = kv_type == "f32" and not flash_attention
    assert np.abs(actual - expected).max() <= (5e-5 if exact else 3e-2)
    assert kl(expected, actual) <= 1e-5 < 1e-2 < kl(expected, oracle(tokens, None))


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_soft_prompt_alone_is_decoded_by_the_model_itself(f32_file, oracle, tiny_patch, kv_type):
    soft = replace(tiny_patch, kv_seed=None)
    with load(f32_file, soft, kv_type=kv_type, flash_attention=kv_type != "f32") as runtime:
        assert runtime.seed_route == "decoded"
        tokens = runtime.tokens(PROMPT)
        expected, actual = oracle(tokens, soft.soft_prompt), runtime.logits(tokens)
    assert np.abs(actual - expected).max() <= 5e-5 if kv_type == "f32" else kl(expected, actual) <= 1e-3


def test_long_prompts_are_evaluated_in_chunks(f32_file, oracle, tiny_patch, monkeypatch):
    monkeypatch.setattr("edgepatch.runtimes.llamacpp.context.CHUNK", 20)
    rng = np.random.default_rng(1)
    long_prompt = SoftPrompt((rng.standard_normal((47, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
    with load(f32_file, replace(tiny_patch, soft_prompt=long_prompt, kv_seed=None, canary=None)) as runtime:
        tokens = [int(t) for t in rng.integers(20, 300, 55)]
        expected = oracle(tokens, long_prompt)
        assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-5
        runtime.reset()
        assert np.abs(runtime.logits_of_last(tokens) - expected[-1]).max() <= 5e-5


def test_a_wrong_key_order_is_caught_by_calibration(f32_file, tiny_patch, oracle, monkeypatch, tmp_path):
    """Without the candidate that is right, no other may be taken for it."""
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(llamacpp_layout, "interleave", lambda keys: keys)
    with load(f32_file, tiny_patch) as runtime:
        assert runtime.seed_route == "decoded" and "no layout" in runtime.backend.seeds.reason
        tokens = runtime.tokens(PROMPT)
        assert np.abs(runtime.logits(tokens) - oracle(tokens, tiny_patch.soft_prompt)).max() <= 5e-5
    with pytest.raises(InputError, match="no layout"):
        load(f32_file, tiny_patch, seed_route="stored")


WRONG_LAYOUTS = {
    "no permutation": (Layout(False, 0, 0, ((0, 1),)), {}),
    "layers exchanged": (Layout(True, 0, 0, ((1, 0),)), {}),
    "rotation where there is none": (Layout(True, 64, 64, ((0, 1),)), {}),
    "no rotation of quantized keys": (Layout(True, 0, 64, ((0, 1),)), {"kv_type": "q8_0", "flash_attention": True}),
    "no rotation of quantized values": (Layout(True, 64, 0, ((0, 1),)), {"kv_type": "q8_0", "flash_attention": True}),
    "no rotation at 4 bits": (Layout(True, 0, 0, ((0, 1),)), {"kv_type": "q4_0", "flash_attention": True}),
}


@pytest.mark.parametrize("name", WRONG_LAYOUTS)
def test_a_wrong_layout_is_caught_by_the_canary(f32_file, tiny_patch, monkeypatch, name):
    layout, options = WRONG_LAYOUTS[name]
    monkeypatch.setattr(Calibration, "layout", layout)
    monkeypatch.setattr(Calibration, "has_confirmed", lambda *_: True)
    with pytest.raises(InactivePatchError, match="canary"):
        load(f32_file, tiny_patch, **options)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_the_layout_is_measured_once_and_kept(f32_file, tiny_patch, kv_type, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    block = 64 if kv_type.startswith("q") else 0
    options = {"kv_type": kv_type, "flash_attention": True}
    with load(f32_file, tiny_patch, **options) as runtime:
        assert runtime.seed_route == "stored" and runtime.backend.calibration.layout == Layout(
            True, block, block, ((0, 1),)
        )
        fresh = runtime.logits(PROMPT)
    monkeypatch.setattr(llamacpp_layout, "measure", None)
    with load(f32_file, tiny_patch, **options) as runtime:
        assert np.array_equal(runtime.logits(PROMPT), fresh)


def test_a_known_layout_does_not_excuse_another_seed(f32_file, tiny_patch, tiny_folder, monkeypatch, tmp_path):
    """A seed that was computed with another rope theta has the right order; each seed is compared once, not each model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    load(f32_file, tiny_patch).close()
    config = AutoConfig.from_pretrained(tiny_folder)
    config.rope_parameters["rope_theta"] *= 4
    foreign = seeds.compute_kv_seed(
        AutoModelForCausalLM.from_pretrained(tiny_folder, config=config), tiny_patch.soft_prompt
    )
    with load(f32_file, replace(tiny_patch, kv_seed=foreign)) as runtime:
        assert runtime.seed_route == "decoded" and "no layout" in runtime.backend.seeds.reason


def test_a_spoiled_calibration_file_is_measured_again(f32_file, tiny_patch, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    load(f32_file, tiny_patch).close()
    (file,) = (tmp_path / "calibration").iterdir()
    for content in (
        "",
        "[]",
        '{"layout": 3}',
        '{"layout": {"rotates_neighbours": 1}}',
        '{"layout": {"layers": [["x"]]}}',
    ):
        file.write_text(content)
        with load(f32_file, tiny_patch) as runtime:
            assert runtime.seed_route == "stored"


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_a_seed_alone_is_laid_out_by_what_rope_does(f32_file, tiny_patch, oracle, kv_type):
    """Also without a canary: such a patch comes from an adapter whose model is not at hand."""
    alone = replace(tiny_patch, soft_prompt=None, canary=None)
    with load(f32_file, alone, kv_type=kv_type, flash_attention=kv_type != "f32") as runtime:
        assert runtime.seed_route == "stored"
        tokens = runtime.tokens(PROMPT)
        expected, actual = oracle(tokens, tiny_patch.soft_prompt), runtime.logits(tokens)
    assert np.abs(actual - expected).max() <= 5e-5 if kv_type == "f32" else kl(expected, actual) <= 1e-3


def test_what_rope_does_is_measured_once_for_seeds_that_a_canary_proves(f32_file, tiny_patch, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    measure, measured = Calibration.layout_by_rope, []
    monkeypatch.setattr(Calibration, "layout_by_rope", lambda self: measured.append(self) or measure(self))
    alone, unproved = replace(tiny_patch, soft_prompt=None), replace(tiny_patch, soft_prompt=None, canary=None)
    for patch, total in ((alone, 1), (alone, 1), (unproved, 2), (unproved, 3)):
        with load(f32_file, patch) as runtime:
            assert runtime.seed_route == "stored"
        assert len(measured) == total


def test_a_seed_alone_is_refused_where_rope_shows_nothing(f32_file, tiny_patch, monkeypatch):
    monkeypatch.setattr(llamacpp_layout, "turns_neighbours", lambda *_: None)
    with pytest.raises(InputError, match="cannot be confirmed"):
        load(f32_file, replace(tiny_patch, soft_prompt=None, canary=None))


def test_an_unknown_state_layout_falls_back_to_decoding(f32_file, tiny_patch, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(llamacpp_state, "MAX_HEADER_BYTES", 4)
    with load(f32_file, tiny_patch) as runtime:
        assert runtime.seed_route == "decoded" and "one reading" in runtime.backend.seeds.reason
    with pytest.raises(InactivePatchError, match="one reading"):
        load(f32_file, replace(tiny_patch, soft_prompt=None))


def test_greedy_tokens_are_those_of_torch_on_the_same_half_precision_weights(tiny_folder, tiny_patch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, path = tmp_path / "half", tmp_path / "half.gguf"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    patch = replace(tiny_patch, base=writer.convert_folder(folder, path, "F16"))
    assert patch.base == tiny_patch.base, "rounding the weights to half precision must not change the model's identity"
    with load_runtime(folder, patch) as torch_runtime, load(path, patch, exact=False) as runtime:
        assert runtime.quantization == "F16"
        for prompt in (PROMPT, OTHER, [{"role": "user", "content": "Hello"}]):
            pieces, expected = (list(r.stream(prompt, GREEDY)) for r in (runtime, torch_runtime))
            assert [p.token_id for p in pieces] == [p.token_id for p in expected]
            # A random model breaks off within characters; only when that is told differs.
            found_text, expected_text = ("".join(p.text for p in some).strip("\ufffd") for some in (pieces, expected))
            assert found_text == expected_text


def test_the_seed_survives_everything_a_caller_can_do(runtime):
    fresh = runtime.logits(PROMPT)
    actions = [
        runtime.reset,
        lambda: runtime.generate(OTHER, GREEDY),
        lambda: runtime.logits([7] * runtime.context_length),
        lambda: list(runtime.stream([7] * (runtime.context_length - 3), GREEDY)),
        lambda: next(iter(runtime.stream(OTHER, GREEDY))),
        lambda: runtime.generate_many(OTHER, replace(GREEDY, temperature=1, rng_seed=1), 5),
        lambda: runtime.backend.model.lib.llama_memory_seq_rm(runtime.backend.context._memory, 0, 0, 3),
        lambda: runtime.backend.model.lib.llama_memory_clear(runtime.backend.context._memory, True),
    ]
    for number, action in enumerate(actions):
        action()
        assert np.array_equal(runtime.logits(PROMPT), fresh) or np.abs(runtime.logits(PROMPT) - fresh).max() < 1e-4, (
            number
        )
    with pytest.raises(InputError, match="context holds"):
        runtime.logits([7] * (runtime.context_length + 1))


def test_prompt_reuse_does_not_change_the_answer(runtime):
    fresh = runtime.generate(PROMPT, GREEDY)
    runtime.generate(PROMPT + " the lazy cat and", GREEDY)
    assert runtime.generate(PROMPT, GREEDY) == fresh
    assert runtime.backend.rewind(0, 2) == 2


def test_memory_that_cannot_be_cut_starts_afresh(f32_file, tiny_patch, monkeypatch):
    with load(f32_file, tiny_patch) as runtime:
        fresh = runtime.generate(PROMPT, GREEDY)
        remove = runtime.backend.model.lib.llama_memory_seq_rm
        monkeypatch.setattr(
            runtime.backend.model.lib,
            "llama_memory_seq_rm",
            lambda m, s, first, last: first < 0 and remove(m, s, first, last),
        )
        assert runtime.backend.rewind(0, 2) == 0
        runtime.sequences.forget()
        assert runtime.generate(PROMPT, GREEDY) == fresh


def test_patch_for_another_model_names_every_difference(f32_file, tiny_patch):
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5, weight_fingerprint="0" * 64))
    with pytest.raises(MismatchError) as caught:
        load(f32_file, other)
    assert set(caught.value.differences) == {"rope_theta", "weight_fingerprint"}


def test_a_fine_tune_with_the_same_norms_is_refused(tiny_folder, tiny_patch, tmp_path):
    """What the norms cannot see: the weights of one matrix moved by 2 %."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tuned"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] += 0.02 * weights[name].std() * torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert writer.convert_folder(folder, tmp_path / "tuned.gguf", "F16") == tiny_patch.base, (
        "the spec alone cannot tell"
    )
    for runtime in (
        lambda patch: load(tmp_path / "tuned.gguf", patch, exact=False),
        lambda patch: load_runtime(folder, patch),
    ):
        with pytest.raises(MismatchError, match="ffn_up of layers 1"):
            runtime(tiny_patch)
        with runtime(None) as bare, pytest.raises(MismatchError, match="sampled weights"):
            bare.swap(tiny_patch)


def test_options_that_cannot_be_used_are_refused(f32_file, tiny_patch, tmp_path):
    with pytest.raises(InputError, match="KV type"):
        load(f32_file, tiny_patch, kv_type="q3")
    with pytest.raises(InputError, match="flash attention"):
        load(f32_file, tiny_patch, kv_type="q8_0")
    with pytest.raises(InputError, match="KV seed alone"):
        load(f32_file, replace(tiny_patch, soft_prompt=None), seed_route="decoded")
    with pytest.raises(InputError, match="no stored seed"):
        load(f32_file, replace(tiny_patch, kv_seed=None), seed_route="stored")
    with pytest.raises(InputError, match="seed route"):
        load(f32_file, tiny_patch, seed_route="guessed")
    with pytest.raises(InputError, match="number of sequences"):
        load(f32_file, tiny_patch, num_sequences=0)
    for positions in (0, 10, 513):
        with pytest.raises(InputError, match="context length"):
            load(f32_file, tiny_patch, context_length=positions)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(f32_file.read_bytes()[:-5000])
    with pytest.raises(InputError, match="truncated"):
        load(truncated, tiny_patch)


def test_a_seed_beyond_half_precision_is_refused(tiny_patch):
    seed = tiny_patch.kv_seed
    with pytest.raises(PatchFormatError, match="65504"):
        replace(tiny_patch, kv_seed=replace(seed, values=(seed.values[0] * 1e6, *seed.values[1:])))
    with pytest.raises(InputError, match="float16"):
        llamacpp_layout.encode_rows(np.full((2, 3, 64), 7e4, dtype=np.float32), 1, False)


def test_a_context_shorter_than_the_models_is_kept(f32_file, tiny_patch):
    with load(f32_file, tiny_patch, context_length=100) as runtime:
        assert runtime.context_length == 100 - tiny_patch.num_virtual_tokens
        assert runtime.logits([7] * runtime.context_length).shape == (runtime.context_length, runtime.spec.vocab_size)


def test_a_closed_model_is_an_error_not_a_crash(f32_file, tiny_patch):
    runtime = load(f32_file, tiny_patch)
    runtime.close()
    runtime.close()
    with pytest.raises(EdgepatchError, match="closed"):
        runtime.logits([1, 2, 3])
    with pytest.raises(EdgepatchError, match="closed"):
        runtime.encode("text")


def test_stored_and_decoded_seed_agree_on_quantized_weights(f32_file, tiny_patch, oracle, tmp_path):
    path = tmp_path / "Q8_0.gguf"
    writer.quantize(f32_file, path, "Q8_0", num_threads=1)
    for patch in (tiny_patch, replace(tiny_patch, kv_seed=None)):
        with load(path, patch, exact=False) as runtime:
            tokens = runtime.tokens(PROMPT)
            assert kl(oracle(tokens, patch.soft_prompt), runtime.logits(tokens)) <= 1e-2


def test_a_half_precision_seed_is_enough(f32_file, tiny_folder, tiny_patch, oracle):
    seed = seeds.compute_kv_seed(folders.load_model(tiny_folder), tiny_patch.soft_prompt, np.float16)
    with load(f32_file, replace(tiny_patch, kv_seed=seed)) as runtime:
        tokens = runtime.tokens(PROMPT)
        assert kl(oracle(tokens, tiny_patch.soft_prompt), runtime.logits(tokens)) <= 1e-5


# Sequences and swaps.


def test_sequences_share_the_seed_and_nothing_else(f32_file, tiny_patch):
    prompts = [PROMPT, OTHER, "Hello", PROMPT]
    with load(f32_file, tiny_patch) as runtime:
        alone = [[p.token_id for p in runtime.stream(prompt, GREEDY)] for prompt in prompts]
    with load(f32_file, tiny_patch, num_sequences=4) as runtime:
        streams = [runtime.stream(prompt, GREEDY, sequence=i) for i, prompt in enumerate(prompts)]
        together: list[list[int]] = [[] for _ in prompts]
        while live := [i for i, ids in enumerate(together) if len(ids) < len(alone[i])]:
            for i in live:
                together[i].append(next(streams[i]).token_id)
        assert together == alone
        with pytest.raises(InputError, match="sequence"):
            list(runtime.stream(PROMPT, GREEDY, sequence=4))


def test_every_sequence_has_the_whole_context(f32_file, tiny_patch):
    with load(f32_file, tiny_patch, num_sequences=3, context_length=256) as runtime:
        for sequence in range(3):
            runtime.logits_of_last([7] * runtime.context_length, sequence=sequence)
        fresh = load(f32_file, tiny_patch, context_length=256)
        expected = fresh.logits_of_last([7] * fresh.context_length)
        assert np.abs(runtime.logits_of_last([7] * runtime.context_length, sequence=1) - expected).max() < 1e-4


def test_swap_and_unpatch(f32_file, tiny_patch, oracle):
    model_patch = replace(
        tiny_patch,
        name="other",
        kv_seed=None,
        canary=None,
        soft_prompt=SoftPrompt(tiny_patch.soft_prompt.embeddings[::-1][:7].copy()),
    )
    with load(f32_file, tiny_patch) as runtime:
        tokens = runtime.tokens(PROMPT)
        fingerprints, length = set(), runtime.context_length
        for patch in (model_patch, None, tiny_patch, None, model_patch, tiny_patch):
            runtime.swap(patch)
            expected = oracle(tokens, patch.soft_prompt if patch else None)
            assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-5
            fingerprints.add(runtime.system_fingerprint)
        assert len(fingerprints) == 3
        runtime.swap(None)
        assert runtime.context_length == length + tiny_patch.num_virtual_tokens and runtime.seed_route == ""


def test_a_failed_swap_leaves_the_old_patch_in_place(f32_file, tiny_patch):
    broken = replace(
        tiny_patch, name="broken", kv_seed=None, soft_prompt=SoftPrompt(tiny_patch.soft_prompt.embeddings[::-1].copy())
    )
    foreign = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5))
    with load(f32_file, tiny_patch) as runtime:
        fresh, fingerprint = runtime.logits(PROMPT), runtime.system_fingerprint
        for patch, error, words in ((broken, InactivePatchError, "canary"), (foreign, MismatchError, "rope_theta")):
            with pytest.raises(error, match=words):
                runtime.swap(patch)
            assert runtime.system_fingerprint == fingerprint
            assert np.array_equal(runtime.logits(PROMPT), fresh)


def test_a_lost_seed_is_an_error_not_an_unpatched_reply(f32_file, tiny_patch):
    with load(f32_file, tiny_patch) as runtime:
        runtime.logits(PROMPT)
        runtime.backend.context.clear()
        with pytest.raises(InactivePatchError, match="not intact"):
            runtime.backend.forward(0, [5], every=False)


def test_a_seed_that_the_library_does_not_take_leaves_nothing(f32_file, tiny_patch):
    with load(f32_file, tiny_patch) as runtime:
        state = runtime.backend.context.state(runtime.backend._master)
        for wrong in (state[:-7], state[:40], b""):
            with pytest.raises(InactivePatchError, match="of the seed"):
                runtime.backend.context.restore(0, wrong)
            assert runtime.backend.context.last_position(0) == -1
