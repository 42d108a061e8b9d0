"""The real llama_cpp, but for a function that ends its process or never returns: which one, DYING_LLAMA says.

A folder in front of it on the path puts it in the place of the real package, in a process and in all of its children.
"""

import importlib.machinery
import os
import signal
import sys
import time

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_REAL = importlib.machinery.PathFinder.find_spec(
    "llama_cpp", [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
)
__path__ = list(_REAL.submodule_search_locations)  # another list than that of this package's spec, which stays
with open(_REAL.origin, encoding="utf-8") as _file:
    exec(compile(_file.read(), _REAL.origin, "exec"))

from llama_cpp.llama_cpp import llama_decode as _decode  # noqa: E402
from llama_cpp.llama_cpp import llama_model_load_from_file as _load  # noqa: E402

_MODE = os.environ.get("DYING_LLAMA", "")
_repacked = False


def _die(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def llama_model_load_from_file(path, parameters):
    global _repacked
    _repacked = parameters.use_extra_bufts and not parameters.vocab_only
    return _die() if _MODE == "load" else _load(path, parameters)


def llama_decode(context, batch):
    if _MODE == "decode" or (_MODE == "repacked" and _repacked):
        _die()
    if _MODE == "embeddings" and batch.embd:
        _die()
    if _MODE == "hang":
        time.sleep(600)
    return _decode(context, batch)


if _MODE == "quantize":
    llama_model_quantize = _die
if _MODE == "import":
    _die()
