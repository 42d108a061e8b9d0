"""The same tokens end a reply on every runtime."""

from edgepatch.text.end_tokens import ends_by_name


def test_ends_are_those_of_llama_cpp():
    assert ends_by_name({"a": 0, "<|im_end|>": 1, "<|endoftext|>": 2, "<|fim_pad|>": 3}) == {1, 2, 3}
    assert ends_by_name({"<PAD>": 1, "[PAD]": 2, "<|file_sep|>": 3}) == {
        3
    }  # of the first two llama.cpp takes one or the other
    assert ends_by_name({"<|return|>": 1, "<|call|>": 2, "<|end|>": 3}) == {1, 2}
    assert ends_by_name({"<|call|>": 2, "<|end|>": 3}) == {2, 3}
    assert ends_by_name({"<|tool_response>": 1, "</s>": 2}) == {1}
