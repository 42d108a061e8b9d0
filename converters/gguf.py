"""GGUF base models: every name that the rest of the project uses, whichever module it comes from."""

from edgepatch.converters.dequantization import requantize
from edgepatch.converters.gguf_header import GGUFHeader, TensorInfo, read_header
from edgepatch.converters.gguf_library import library_errors, load_library, quantization_types
from edgepatch.converters.gguf_specs import quantization, read_spec, spec_of
from edgepatch.converters.gguf_writer import convert_folder, quantize

__all__ = [
    "GGUFHeader",
    "TensorInfo",
    "convert_folder",
    "library_errors",
    "load_library",
    "quantization",
    "quantization_types",
    "quantize",
    "read_header",
    "read_spec",
    "requantize",
    "spec_of",
]
