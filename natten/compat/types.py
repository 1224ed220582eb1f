"""Types of arguments in NATTEN 0.17 and later, for annotations."""

from enum import Enum

from torch import Tensor

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType

CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType

# "OrDed": or a single value for all axes, from which the others are deduced.
Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
DimensionTypeOrDed = int | DimensionType
CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType

ListOrNestedTensor = list | Tensor

# Configurations of kernels that do not exist here.


class KernelSchedule(Enum):
    """How NATTEN's kernels for Hopper GPUs share work among warps."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


QKTileShapeType = (
    tuple[Dimension1DType, Dimension1DType]
    | tuple[Dimension2DType, Dimension2DType]
    | tuple[Dimension3DType, Dimension3DType]
)
FnaTileShapeType = QKTileShapeType
FnaForwardConfigType = QKTileShapeType
FnaBackwardConfigType = (
    tuple[Dimension1DType, Dimension1DType, Dimension1DType, bool]
    | tuple[Dimension2DType, Dimension2DType, Dimension2DType, bool]
    | tuple[Dimension3DType, Dimension3DType, Dimension3DType, bool]
)
CutlassFnaForwardConfigType = CutlassFnaBackwardConfigType = QKTileShapeType
CutlassBlackwellFnaForwardConfigType = CutlassBlackwellFnaBackwardConfigType = QKTileShapeType
CutlassHopperFnaForwardConfigType = tuple[QKTileShapeType, KernelSchedule]
CutlassHopperFnaBackwardConfigType = QKTileShapeType
FlexFnaForwardConfigType = QKTileShapeType

FmhaForwardConfigType = tuple[int, int]
CutlassFmhaForwardConfigType = CutlassFmhaBackwardConfigType = FmhaForwardConfigType
CutlassBlackwellFmhaForwardConfigType = CutlassBlackwellFmhaBackwardConfigType = FmhaForwardConfigType
CutlassHopperFmhaForwardConfigType = tuple[FmhaForwardConfigType, KernelSchedule]
CutlassHopperFmhaBackwardConfigType = FmhaForwardConfigType
FlexFmhaForwardConfigType = FmhaForwardConfigType


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    """Return a value for each of `na_dim` axes."""
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    """Return a value for each of `na_dim` axes."""
    return (value,) * na_dim
