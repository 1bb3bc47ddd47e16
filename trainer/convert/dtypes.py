"""Types of tensors by the names that torch gives them, and arithmetic on the bytes of a block without torch.

Importing torch takes longer than copying the weights of a large model; NumPy has all that is needed here but bfloat16,
whose values are the upper halves of float32.
"""

from typing import TYPE_CHECKING, Any

from trainer.convert.errors import ConversionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex128": 16, "complex64": 8,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
INFINITY = {"float64": 0x7FF << 52, "float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of positive infinity: those of finite numbers are less, those of NaNs are more, whatever the sign."""
OUTPUTS = {
    "fp32": "float32", "float32": "float32",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16",
}  # fmt: skip


def resolve_dtype(dtype: str | None) -> str:
    """torch's name of the type that a user asks for; float32 for None.

    Raises:
        ConversionError: there is no such type.
    """
    if dtype is None:
        return "float32"
    if dtype not in OUTPUTS:
        raise ConversionError(f"dtype ({dtype}) must be one of {', '.join(OUTPUTS)}; leave it out for fp32.")
    return OUTPUTS[dtype]


def cast(content: "Bytes", source: str, target: str) -> "Bytes":
    """The bytes of floating-point values in another type, rounded to the nearest, ties to even, as torch does.

    Values that `target` cannot hold become infinite.
    """
    if source == target:
        return content
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        if source == "bfloat16":
            wide: NDArray[np.float32] = (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            wide = content.view(source).astype(np.float32, copy=False)
        if target == "bfloat16":
            return _upper_halves(wide)
        narrow: Bytes = wide.astype(target, copy=False).view(np.uint8)
        return narrow


def _upper_halves(values: "NDArray[np.float32]") -> "Bytes":
    import numpy as np

    bits = values.view(np.uint32)
    # Half of what is cut off is added, less one bit where the last bit that stays is even; this carries as it should.
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).view(np.uint8)


def all_finite(content: "Bytes", dtype: str) -> bool:
    """Whether the bytes of a block hold no NaN and no infinity; True for types that have neither."""
    if dtype not in INFINITY or not len(content):
        return True
    width, infinity = 8 * ITEM_BYTES[dtype], INFINITY[dtype]
    # Read as integers, numbers of either sign grow with their magnitude: two maxima tell, faster than `isfinite`.
    positive: Any = content.view(f"int{width}").max()
    negative: Any = content.view(f"uint{width}").max()
    return bool(positive < infinity) and bool(negative < (1 << (width - 1)) | infinity)
