"""What a dequantized model was made from, in every form that it takes: its weights keep the errors of the first quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.converters.gguf.specs import quantization
from edgepatch.errors import MismatchError

CONFIG_KEY = "edgepatch_origin"
FILE_KEY, QUANTIZATION_KEY = "edgepatch.origin.file", "edgepatch.origin.quantization"
UNQUANTIZED_TYPES = frozenset({0, 1, 30})  # F32, F16, BF16


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
        file: name of the GGUF file.
        quantization: of that file ("Q4_1"); where that file was made from another, both in their order ("Q4_1, then Q8_0").
        name: what the file called the model, or "".
        license: of the model, or "".
    """

    file: str
    quantization: str
    name: str = ""
    license: str = ""

    @classmethod
    def of_header(cls, header: GGUFHeader) -> Origin:
        """The origin of what is made of a GGUF file.

        Raises:
            MissingExtraError: llama-cpp-python or gguf is not installed.
        """
        earlier, own = header.metadata.get(QUANTIZATION_KEY), quantization(header)
        texts = {key: str(header.metadata.get(f"general.{key}", "")) for key in ("name", "license")}
        return cls(header.path.name, f"{earlier}, then {own}" if earlier else own, **texts)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Origin | None:
        """The origin that a folder's ``config.json`` names; ``None`` for none."""
        entry = config.get(CONFIG_KEY)
        if not isinstance(entry, dict) or not {"file", "quantization"} <= set(entry):
            return None
        return cls(**{key: str(entry.get(key, "")) for key in ("file", "quantization", "name", "license")})

    def note(self) -> str:
        """What a user must know of the result."""
        return f"made from {self.quantization} weights of {self.file}: it is no more exact than they are"

    def metadata(self) -> dict[str, str]:
        """Entries for a GGUF header."""
        return {
            FILE_KEY: self.file,
            QUANTIZATION_KEY: self.quantization,
            **({"general.license": self.license} if self.license else {}),
        }


@contextmanager
def naming_origin(header: GGUFHeader) -> Iterator[None]:
    """Where weights do not fit a patch, a file that was made from quantized ones says so: finer types keep the errors of the first.

    What it says changes only the hint: nobody signs it.
    """
    try:
        yield
    except MismatchError as error:
        if quantized := header.metadata.get(QUANTIZATION_KEY):
            error.hint = (
                f"{header.path.name} was made from {quantized} weights of {header.metadata.get(FILE_KEY)}, whose errors it keeps: use that "
                "file itself, or quantize the full-precision model"
            )
        raise


def is_quantized(header: GGUFHeader) -> bool:
    """Whether a weight is of another type than F32, F16 and BF16."""
    return any(info.ggml_type not in UNQUANTIZED_TYPES for info in header.tensors.values())
