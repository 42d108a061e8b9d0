"""The llama.cpp runtime against Transformers fed ``inputs_embeds``; the seed stays whatever a caller does."""

from dataclasses import replace

import numpy as np
import pytest

from edgepatch.converters import gguf, hf, rope
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError, MismatchError
from edgepatch.runtimes.llamacpp import LlamaCppRuntime
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.sampling import Sampling
from edgepatch.tensors import SoftPrompt

PROMPT = "The quick brown fox jumps over"
OTHER = "<b>Numbers</b> 1234 and something else"
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def f32_file(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "F32.gguf"
    gguf.convert_folder(tiny_folder, path, "F32")
    return path


def load(path, patch, exact=True, **options):
    """``exact`` is full precision throughout; llama.cpp's flash attention computes in float16."""
    precision = {"kv_type": "f32", "flash_attention": False} if exact else {}
    return LlamaCppRuntime(path, patch, num_threads=1, **(precision | options))


@pytest.fixture(scope="module")
def runtime(f32_file, tiny_patch):
    with load(f32_file, tiny_patch) as loaded:
        yield loaded


def kl(expected, found):
    """Mean KL divergence over tokens of two (T, V) logits."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected.astype(np.float64), found.astype(np.float64)))
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
        expected, found = oracle(tokens, tiny_patch.soft_prompt), runtime.logits(tokens)
    exact = kv_type == "f32" and not flash_attention
    assert np.abs(found - expected).max() <= (5e-5 if exact else 3e-2)
    assert kl(expected, found) <= 1e-5 < 1e-2 < kl(expected, oracle(tokens, None))


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_soft_prompt_alone_is_decoded_by_the_model_itself(f32_file, oracle, tiny_patch, kv_type):
    soft = replace(tiny_patch, kv_seed=None)
    with load(f32_file, soft, kv_type=kv_type, flash_attention=kv_type != "f32") as runtime:
        assert runtime.seed_route == "decoded"
        tokens = runtime.tokens(PROMPT)
        expected, found = oracle(tokens, soft.soft_prompt), runtime.logits(tokens)
    assert np.abs(found - expected).max() <= 5e-5 if kv_type == "f32" else kl(expected, found) <= 1e-3


def test_long_prompts_are_evaluated_in_chunks(f32_file, oracle, tiny_patch, monkeypatch):
    monkeypatch.setattr("edgepatch.runtimes.llamacpp.CHUNK", 20)
    rng = np.random.default_rng(1)
    long_prompt = SoftPrompt((rng.standard_normal((47, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
    with load(f32_file, replace(tiny_patch, soft_prompt=long_prompt, kv_seed=None)) as runtime:
        tokens = [int(t) for t in rng.integers(20, 300, 55)]
        expected = oracle(tokens, long_prompt)
        assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-5
        runtime.reset()
        assert np.abs(runtime._evaluate(tokens)[-1] - expected[-1]).max() <= 5e-5


def test_wrong_key_order_would_be_noticed(f32_file, oracle, tiny_patch, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(rope.ROTATES_NEIGHBOURS, "llama", False)
        with load(f32_file, tiny_patch) as runtime:
            tokens = runtime.tokens(PROMPT)
            assert np.abs(runtime.logits(tokens) - oracle(tokens, tiny_patch.soft_prompt)).max() > 0.1


def test_an_unknown_state_layout_is_refused(f32_file, tiny_patch, monkeypatch):
    monkeypatch.setitem(__import__("edgepatch.runtimes.llamacpp", fromlist=["KV_TYPES"]).SEED_TYPES, "f16", np.dtype("<f4"))
    with pytest.raises(InactivePatchError, match="state"):
        load(f32_file, tiny_patch, exact=False)


def test_greedy_tokens_are_those_of_torch_on_the_same_half_precision_weights(tiny_folder, tiny_patch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, path = tmp_path / "half", tmp_path / "half.gguf"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    patch = replace(tiny_patch, base=gguf.convert_folder(folder, path, "F16"))
    assert patch.base == tiny_patch.base, "rounding the weights to half precision must not change the model's identity"
    with TorchRuntime(folder, patch) as torch_runtime, load(path, patch, exact=False) as runtime:
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
        lambda: runtime._lib.llama_memory_seq_rm(runtime._memory, 0, 0, 3),
        lambda: runtime._lib.llama_memory_clear(runtime._memory, True),
    ]
    for number, action in enumerate(actions):
        action()
        assert np.array_equal(runtime.logits(PROMPT), fresh) or np.abs(runtime.logits(PROMPT) - fresh).max() < 1e-4, number
    with pytest.raises(InputError, match="context holds"):
        runtime.logits([7] * (runtime.context_length + 1))


def test_prompt_reuse_does_not_change_the_answer(runtime):
    fresh = runtime.generate(PROMPT, GREEDY)
    runtime.generate(PROMPT + " the lazy cat and", GREEDY)
    assert runtime.generate(PROMPT, GREEDY) == fresh
    assert runtime._rewind(2) == 2


def test_memory_that_cannot_be_cut_starts_afresh(f32_file, tiny_patch, monkeypatch):
    with load(f32_file, tiny_patch) as runtime:
        fresh = runtime.generate(PROMPT, GREEDY)
        monkeypatch.setattr(runtime._lib, "llama_memory_seq_rm", lambda *_: False)
        assert runtime._rewind(2) == 0
        runtime._evaluated = []
        assert runtime.generate(PROMPT, GREEDY) == fresh


def test_patch_for_another_model_names_every_difference(f32_file, tiny_patch):
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5, weight_fingerprint="0" * 64))
    with pytest.raises(MismatchError) as caught:
        load(f32_file, other)
    assert set(caught.value.differences) == {"rope_theta", "weight_fingerprint"}


def test_options_that_cannot_be_used_are_refused(f32_file, tiny_patch, tmp_path):
    with pytest.raises(InputError, match="KV type"):
        load(f32_file, tiny_patch, kv_type="q3")
    with pytest.raises(InputError, match="flash attention"):
        load(f32_file, tiny_patch, kv_type="q8_0")
    with pytest.raises(InputError, match="KV seed alone"):
        load(f32_file, replace(tiny_patch, soft_prompt=None), kv_type="q8_0", flash_attention=True)
    for positions in (0, 10, 513):
        with pytest.raises(InputError, match="context length"):
            load(f32_file, tiny_patch, context_length=positions)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(f32_file.read_bytes()[:-5000])
    with pytest.raises(InputError, match="truncated"):
        load(truncated, tiny_patch)


def test_a_seed_beyond_half_precision_is_refused(f32_file, tiny_patch):
    seed = tiny_patch.kv_seed
    large = replace(tiny_patch, kv_seed=replace(seed, values=(seed.values[0] * 1e6, *seed.values[1:])))
    with pytest.raises(InputError, match="float16"):
        load(f32_file, large, exact=False)


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
    gguf.quantize(f32_file, path, "Q8_0", num_threads=1)
    for patch in (tiny_patch, replace(tiny_patch, kv_seed=None)):
        with load(path, patch, exact=False) as runtime:
            tokens = runtime.tokens(PROMPT)
            assert kl(oracle(tokens, patch.soft_prompt), runtime.logits(tokens)) <= 1e-2


def test_a_half_precision_seed_is_enough(f32_file, tiny_folder, tiny_patch, oracle):
    seed = hf.compute_kv_seed(hf.load_model(tiny_folder), tiny_patch.soft_prompt, np.float16)
    with load(f32_file, replace(tiny_patch, kv_seed=seed)) as runtime:
        tokens = runtime.tokens(PROMPT)
        assert kl(oracle(tokens, tiny_patch.soft_prompt), runtime.logits(tokens)) <= 1e-5
