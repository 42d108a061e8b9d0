"""Text that would end the process, take for ever or never fit: refused in words, or tokenized; what fits is never refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgepatch.converters.gguf.text import MAX_MARKS, MAX_UNKNOWN
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime
from edgepatch.text.limits import (
    LOOSE_TEXT_BYTES,
    MAX_BLANKS,
    MAX_RUN,
    TextBound,
    TooLongError,
    call_with_stack,
    require_short_runs,
)
from edgepatch.text.tokenizer_bounds import measure_bound
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.text.vocabularies import byte_characters
from kit import tiny_gguf

RUNS = {
    "a letter": "a",
    "mixed case": "aA",
    "digits": "1",
    "blanks": " ",
    "lines": "\r\n",
    "tabs": "\t",
    "punctuation": "=",
    "apostrophes": "'",
    "marks": "\u0301",
    "CJK": "\u4e2d",
    "emoji": "\U0001f642",
    "NULs": "\0",
    "replacements": "\ufffd",
    "letters and blanks": "a ",
    "blanks and lines": " \n",
}
# One of each kind: std::regex with and without look-ahead, over sentences, over numbers, over non-blanks, and no regex at all.
PRE_TOKENIZERS = ["tekken", "exaone-moe", "superbpe", "whitespace", "jais-2", "default"]


def write(path: Path, add_tokenizer) -> Path:
    tiny_gguf.write_llama(path, add_tokenizer)
    return path


# Runs.

HAMMER = """
    import resource, sys
    from pathlib import Path
    from edgepatch.converters.gguf.vocabulary import Vocabulary
    from edgepatch.errors import EdgepatchError
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path, texts = Path(sys.argv[1]), eval(sys.argv[2])
    with Vocabulary(path) as vocabulary:
        for name, part in texts.items():
            for length in (60_000, 140_000):
                try:
                    words = f"{len(vocabulary.tokenize(part * (length // len(part)), False, False))} tokens"
                except EdgepatchError as error:
                    words = f"{type(error).__name__}: {error}"
                print(name, length, words, sep="|")
"""


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_run_ends_the_process(tmp_path, pre):
    path = write(tmp_path / "m.gguf", partial(tiny_gguf.add_byte_level, pre=pre))
    code = textwrap.dedent(HAMMER)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), repr(RUNS)], capture_output=True, text=True, timeout=300
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 2 * len(RUNS), done.stderr[-500:]
    for name, _, words in lines:
        assert words.endswith(" tokens") or words.startswith("InputError"), (name, words)
    tokenized = {name for name, length, words in lines if length == "60000" and words.endswith(" tokens")}
    assert {"a letter", "CJK", "punctuation"} <= tokenized  # long words are no reason to refuse a text


def test_without_the_stack_the_process_dies(tmp_path):
    """The guard is needed: the bare library ends the process on the text that is tokenized above."""
    path = write(tmp_path / "m.gguf", partial(tiny_gguf.add_byte_level, pre="tekken"))
    code = textwrap.dedent("""
        import resource, sys
        from edgepatch.converters.gguf.library import load_library
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        lib = load_library(); options = lib.llama_model_default_params(); options.vocab_only = True
        model = lib.llama_model_load_from_file(sys.argv[1].encode(), options)
        ids = (lib.llama_token * 60_000)()
        lib.llama_tokenize(lib.llama_model_get_vocab(model), b"a" * 60_000, 60_000, ids, 60_000, False, False)
    """)
    assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode < 0


def test_deep_words_have_the_same_ids(tmp_path):
    path = write(tmp_path / "m.gguf", partial(tiny_gguf.add_byte_level, pre="tekken"))
    with Vocabulary(path) as vocabulary:
        assert vocabulary.tokenize("th" * 30_000, False, False) == vocabulary.tokenize("th", False, False) * 30_000


@pytest.mark.parametrize(
    ("text", "words"), [("a" * (MAX_RUN + 1), "without a break"), (" " * (MAX_BLANKS + 1), "blanks")]
)
def test_a_run_beyond_the_limit_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        require_short_runs(f"x\n{text}y" if text[0] == "a" else f"x{text}y")
    assert require_short_runs(f"x{text[3:]}y") >= len(text) - 3


def test_marks_and_unknown_characters_are_counted(tmp_path):
    marks = write(tmp_path / "marks.gguf", partial(tiny_gguf.add_byte_level, marks=("\t", "\t\t", "<b>")))
    with Vocabulary(marks) as vocabulary:
        assert len(vocabulary.tokenize("\t\tx" * 4000, False, False)) == 8000  # the longer is one
        with pytest.raises(InputError, match=f"more than {MAX_MARKS} of the vocabulary's own marks"):
            vocabulary.tokenize("\tx" * (MAX_MARKS + 1), False, False)
        assert len(vocabulary.tokenize("<" * 30_000, False, False)) == 30_000  # looks like one and is none
    pieces = write(tmp_path / "pieces.gguf", tiny_gguf.add_sentencepiece)
    with Vocabulary(pieces) as vocabulary:
        assert len(vocabulary.tokenize("a" * 40_000, False, False)) >= 40_000  # all of them known
        with pytest.raises(InputError, match="does not hold"):
            vocabulary.tokenize("\u4e2d" * (MAX_UNKNOWN + 1), False, False)


def test_what_a_vocabulary_lacks_does_not_end_the_process(tmp_path):
    pieces = write(tmp_path / "m.gguf", partial(tiny_gguf.add_sentencepiece, num_bytes=16))
    with Vocabulary(pieces) as vocabulary:
        assert vocabulary.tokenize("abc a", False, False)
        with pytest.raises(InputError, match="no token for 'z'"):
            vocabulary.tokenize("abz", False, False)
    blanks = write(tmp_path / "blanks.gguf", partial(tiny_gguf.add_byte_level, pre="whitespace"))
    with Vocabulary(blanks) as vocabulary, pytest.raises(InputError, match="two blanks"):
        vocabulary.tokenize("a  b", False, False)


def test_a_vocabulary_waits_for_its_readers_before_it_is_freed(tmp_path):
    path = write(tmp_path / "m.gguf", partial(tiny_gguf.add_byte_level, pre="tekken"))
    runtime = load_runtime(path, None)
    lengths = []
    reader = threading.Thread(target=lambda: lengths.append(len(runtime.encode("ab " * 200_000))))
    reader.start()
    while not runtime.backend._tokenizer._num_calls and reader.is_alive():
        time.sleep(0.001)
    runtime.close()
    reader.join()
    assert lengths == [600_000]
    for _ in range(100):  # freed memory must not even be looked at
        with pytest.raises(EdgepatchError, match="the model is closed"):
            runtime.encode("a")


def test_an_error_of_the_deep_thread_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        call_with_stack(lambda: 1 // 0, MAX_RUN)
    depth = threading.stack_size()
    assert (
        call_with_stack(threading.stack_size, MAX_RUN) in (depth, 2**20 + MAX_RUN * 2**10)
        and threading.stack_size() == depth
    )


# Bytes.


def byte_level(tokens: list[str] = []) -> Tokenizer:  # noqa: B006 - only read
    vocabulary = {token: i for i, token in enumerate([*sorted(byte_characters()), *tokens])}
    merges = [(token[: len(token) // 2], token[len(token) // 2 :]) for token in tokens]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_bytes(**options) -> Tokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "aa", "aaaa"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a"), ("aa", "aa")], unk_token="<unk>", **options))


def bound_of(tokenizer: Tokenizer) -> TextBound:
    return measure_bound(json.loads(tokenizer.to_str()))


def changed(tokenizer: Tokenizer, **parts) -> Tokenizer:
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_added(token: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    return tokenizer


TIGHT = {
    "byte level": byte_level(["aa", "aaaa"]),
    "byte level, composed": changed(byte_level(["aa"]), normalizer=normalizers.NFC()),
    "byte level, compatible": changed(byte_level(["aa"]), normalizer=normalizers.NFKC()),
    "byte level, small letters": changed(byte_level(["aa"]), normalizer=normalizers.Lowercase()),
    "pieces with bytes": changed(
        with_bytes(byte_fallback=True, fuse_unk=True), normalizer=normalizers.Replace(" ", "\u2581")
    ),
    "a replaced text": changed(byte_level(), normalizer=normalizers.Replace("abcdefgh", "a")),
    "a long added token": with_added(AddedToken("<a very long token>", normalized=False)),
}
LOOSE = {
    "stripped": changed(byte_level(), normalizer=normalizers.Strip()),
    "replaced by expression": changed(byte_level(), normalizer=normalizers.Replace(Regex(" +"), " ")),
    "a token that swallows blanks": with_added(AddedToken("<m>", rstrip=True, normalized=False)),
    "unknown characters as one": changed(with_bytes(fuse_unk=True), normalizer=None),
    "blanks removed": changed(byte_level(), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "split and removed": changed(byte_level(), pre_tokenizer=pre_tokenizers.Split("a", "removed")),
    "word pieces": Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    "words": Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    "unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)),
}
LOOSE["cut off"] = byte_level()
LOOSE["cut off"].enable_truncation(8)
PARTS = [
    "a",
    "aaaa",
    " ",
    "\u00e9",
    "e\u0301",
    "\u1fa2",
    "\ufb01",
    "\U0001d400",
    "\uff41",
    "\u4e2d",
    "\U0001f642",
    "\u212a",
    "abcdefgh",
    "<m>",
    "<a very long token>",
]


@pytest.mark.parametrize("kind", TIGHT)
def test_a_tight_bound_refuses_nothing_that_fits(kind):
    """Random texts of every kind of part: never more bytes a token than the bound says."""
    tokenizer, rng = TIGHT[kind], np.random.default_rng(1)
    bound = bound_of(tokenizer)
    assert bound.is_tight and not bound.dropped
    most = 0.0
    for _ in range(300):
        text = "".join(rng.choice(PARTS[: rng.integers(1, len(PARTS) + 1)], rng.integers(1, 40)))
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        bound.require_fit(text, count)
        most = max(most, len(text.encode()) / count)
    assert bound.longest_token <= 8 * most  # nor is it far off
    with pytest.raises(TooLongError, match="expected a prompt of at most 10 tokens"):
        bound.require_fit("a" * (10 * bound.longest_token + 1), 10)


@pytest.mark.parametrize("kind", LOOSE)
def test_where_text_can_vanish_only_a_fixed_limit_holds(kind):
    bound = bound_of(LOOSE[kind])
    assert not bound.is_tight
    bound.require_fit("a" * LOOSE_TEXT_BYTES, 10)
    with pytest.raises(TooLongError):
        bound.require_fit("a" * (LOOSE_TEXT_BYTES + 1), 10)


FOLDERS = {
    "byte level": byte_level(["aa", "aaaa"]),
    "pieces with bytes": with_bytes(byte_fallback=True, fuse_unk=True),
    "numbers from behind": changed(
        byte_level(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        ),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_runs_in_a_folders_tokenizer(tmp_path, kind):
    FOLDERS[kind].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = FolderTokenizer(tmp_path)
    for name, part in RUNS.items():
        for length in (60_000, 400_000):
            start = time.process_time()
            try:
                assert tokenizer.encode(part * (length // len(part)))
            except InputError as error:
                assert "a tokenizer takes at most" in str(error), name
            assert time.process_time() - start < 5, name
    assert tokenizer.encode("1" * 1000 + "x")
    if kind == "numbers from behind":
        with pytest.raises(InputError, match="without a break"):
            tokenizer.encode("1" * 5000 + "x")


def test_a_folders_tokenizer_serves_several_threads(tmp_path):
    """Whether special tokens are read is one state of the tokenizer: no thread may see that of another."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    shared = FolderTokenizer(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(lambda i: shared.encode("<s>", trusted=i % 2 == 0), range(2000)))
    assert {len(token_ids) for token_ids in ids[::2]} == {1} and {len(token_ids) for token_ids in ids[1::2]} == {3}


def test_bytes_that_vanish_do_not_count():
    bound = TextBound(4, True, dropped=b"\x04")
    bound.require_fit("abcd" * 10 + "\x04" * 1000, 10)
    with pytest.raises(TooLongError):
        bound.require_fit("abcd" * 10 + "a", 10)


def test_the_bound_of_a_gguf_vocabulary(tmp_path):
    runtime = load_runtime(write(tmp_path / "m.gguf", None), None)
    assert runtime.text_bound == TextBound(len("<s14>"), True)
    start = time.perf_counter()
    for prompt in ("a" * 4_000_000, [{"role": "user", "content": "x"}]):
        with pytest.raises(InputError, match=r"at most 128 tokens, which are 640 bytes|no chat template"):
            runtime.tokens(prompt)
    assert time.perf_counter() - start < 0.5
    assert len(runtime.tokens("<" * 640)) == 640  # what may fit is tokenized, and then counted
    runtime.close()
    pieces = write(tmp_path / "pieces.gguf", tiny_gguf.add_sentencepiece)
    with load_runtime(pieces, None) as runtime:
        assert runtime.text_bound.is_tight and runtime.text_bound.longest_token == len("<0x00>")


def test_every_text_goes_through_the_guard():
    """``llama_tokenize`` is called in one place."""
    root = Path(__file__).parent.parent.parent
    files = [file for folder in ("edgepatch", "converters") for file in (root / folder).rglob("*.py")]
    callers = {str(file.relative_to(root)) for file in files if "llama_tokenize(" in file.read_text("utf-8")}
    assert callers == {"converters/gguf/text.py"}


def test_a_closed_vocabulary_is_not_read(tmp_path):
    """Another thread may still hold the tokenizer when the model is closed: an error, not freed memory."""
    vocabulary = Vocabulary(write(tmp_path / "m.gguf", tiny_gguf.add_byte_level))
    vocabulary.close()
    for ends in (False, True):
        with pytest.raises(EdgepatchError, match="closed"):
            vocabulary.tokenize("a", ends)
