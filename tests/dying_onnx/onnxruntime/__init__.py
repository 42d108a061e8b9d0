"""The real onnxruntime, whose sessions end the process. A folder in front of it on the path puts it in the place of the real package."""

import importlib.machinery
import os
import signal
import sys

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PATHS = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
_REAL = importlib.machinery.PathFinder.find_spec("onnxruntime", _PATHS)
__path__ = list(_REAL.submodule_search_locations)
with open(_REAL.origin, encoding="utf-8") as _file:
    exec(compile(_file.read(), _REAL.origin, "exec"))


def InferenceSession(*_, **__):
    os.kill(os.getpid(), signal.SIGSEGV)
