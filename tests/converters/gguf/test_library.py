"""llama.cpp as a library: its functions alone are imported, and the package is whole for everybody else."""

import subprocess
import sys

import pytest

LOADED = """
import sys
from edgepatch.converters.gguf.library import load_library
load_library().llama_backend_init
assert "llama_cpp.llama" not in sys.modules
"""


@pytest.mark.parametrize(
    "program",
    [
        "from llama_cpp import Llama, LlamaGrammar\nimport llama_cpp\nassert llama_cpp.Llama is Llama",
        "from llama_cpp import *\nLlama, llama_backend_init",
        "import llama_cpp.llama\nassert llama_cpp.llama.Llama is llama_cpp.Llama",
        (
            "from llama_cpp import Llama\nfrom edgepatch.converters.gguf import library\n"
            "assert not load_library().llama_model_load_from_file(b'none.gguf', load_library().llama_model_default_params())\n"
            "assert 'none.gguf' in library.library_errors(), 'the log is still ours'"
        ),
        "import llama_cpp\nassert not hasattr(llama_cpp, 'nothing') and not hasattr(llama_cpp, '__wrapped__')",
    ],
    ids=["from", "star", "submodule", "log", "missing"],
)
def test_the_packages_own_classes_come_when_they_are_asked_for(program):
    done = subprocess.run([sys.executable, "-c", LOADED + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_package_that_is_imported_already_is_taken_as_it_is():
    program = (
        "import llama_cpp\nllama = llama_cpp.Llama\n"
        + LOADED.rpartition("assert")[0]
        + "assert llama is llama_cpp.Llama"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
