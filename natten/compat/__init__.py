"""Names, modules, argument orders and switches of NATTEN 0.14 to 0.21.

This file is the table of where older code finds them; `import natten` installs it (`install`). The names in `__all__`
can be imported from natten, natten.functional and this package.

- operators: functions; layers: layers; experimental: natten.experimental.
- switches: natten.context; probes: questions about the machine and the kernels.
- types: natten.types; helpers and testing: natten.utils.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from natten import backends, functional, modules
from natten.compat import experimental, helpers, layers, operators, probes, switches, testing, types

_OPERATORS = (
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "NATTEN1DAVFunction",
    "NATTEN1DQKRPBFunction",
    "NATTEN2DAVFunction",
    "NATTEN2DQKRPBFunction",
    "NATTEN3DAVFunction",
    "NATTEN3DQKRPBFunction",
    "NeighborhoodAttention1DAVAutogradFunction",
    "NeighborhoodAttention1DQKAutogradFunction",
    "NeighborhoodAttention2DAVAutogradFunction",
    "NeighborhoodAttention2DQKAutogradFunction",
    "NeighborhoodAttention3DAVAutogradFunction",
    "NeighborhoodAttention3DQKAutogradFunction",
    "attention",
    "na1d_qk_with_bias",
    "na2d_qk_with_bias",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
)
_LAYERS = (
    "LegacyNeighborhoodAttention1D",
    "LegacyNeighborhoodAttention2D",
    "NeighborhoodAttention",
    "NeighborhoodAttentionGeneric",
)
_PROBES = (
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
)
_SWITCHES = (
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "is_autotuner_enabled",
    "use_deterministic_algorithms",
    *switches.WITHOUT_EFFECT,
)
SWITCHES = (*_PROBES, *_SWITCHES)  # the names in natten.context


def _select(module: ModuleType, names: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_NAMES: dict[str, Any] = {
    **_select(operators, _OPERATORS),
    **_select(layers, _LAYERS),
    **_select(switches, _SWITCHES),
    **_select(probes, (*_PROBES, "HAS_LIBNATTEN", "get_device_cc")),
    **probes.KERNEL_CONFIGS,
}
globals().update(_NAMES)
__all__ = ["SWITCHES", *_NAMES]

_CHECKS = """
    additional_kv_tensor_checks check_all_args check_args_against_input check_backward_tiling_config check_causal_arg
    check_dilation_arg check_input_size_arg check_kernel_schedule check_kernel_size_arg check_stride_arg
    check_tile_shape check_tiling_config fmha_tensor_checks get_num_na_weights is_self_attention log_or_raise_error
    na_tensor_checks
"""
_TENSOR = "check_additional_keys check_additional_values make_attn_tensor_from_input"
_UTILS = _select(helpers, [*_CHECKS.split(), *_TENSOR.split()])
_UTILS |= {"get_device_cc": probes.get_device_cc, "NoneType": types.NoneType}
_TUPLES = _select(helpers, ("ceil_div_int", "ceil_div_tuple", "mul_tuple", "sub_tuple"))
_TUPLES |= _select(types, ("create_causal_arg_from_bool", "create_dim_from_int"))
_TESTING = ("fna_supports_additional_kv", "supports_bfloat16", "supports_float16")
_LIBRARY = {"HAS_LIBNATTEN": probes.HAS_LIBNATTEN}

# Modules of older releases, and what they hold. A package comes before its modules.
_FACES: dict[str, dict[str, Any]] = {
    "natten._environment": _LIBRARY,
    "natten._libnatten": _LIBRARY,
    "natten.attn_merge": {"merge_attentions": functional.merge_attentions},
    "natten.experimental": _select(experimental, ("na1d", "na2d", "na3d")),
    "natten.types": {name: value for name, value in vars(types).items() if not name.startswith("_")},
    "natten.utils": _UTILS,
    "natten.utils.checks": _select(helpers, _CHECKS.split()),
    "natten.utils.device": _select(helpers, ("is_cpu", "is_cuda", "is_rocm")) | _select(probes, ("get_device_cc",)),
    "natten.utils.dtype": _select(helpers, ("is_fp8", "is_full", "is_half")),
    "natten.utils.environment": _select(
        helpers, ("is_torch_compiling", "parse_env_flag", "parse_env_int", "parse_env_str")
    ),
    "natten.utils.log": _select(helpers, ("LogLevel", "NattenLogger", "get_logger", "log_format")),
    "natten.utils.misc": _select(probes, ("get_device_cc",)),
    "natten.utils.tensor": _select(helpers, _TENSOR.split()),
    "natten.utils.testing": testing.SKIPS | _select(testing, _TESTING),
    "natten.utils.tuples": _TUPLES,
    "natten.utils.typing": {"NoneType": types.NoneType},
}


def _names_of_rank(rank: int) -> dict[str, Any]:
    """Return all functions and layers over `rank` axes, for natten.natten*d and natten.na*d."""
    names = vars(functional) | vars(modules)
    return {name: value for name, value in names.items() if f"{rank}d" in name.lower()}


def install(natten: Any) -> None:
    """Add the older names to the modules of natten, and create the older modules.

    Args:
        natten: the module natten.
    """
    added: dict[Any, dict[str, Any]] = {
        natten: _NAMES,
        functional: _NAMES,
        modules: _select(layers, _LAYERS),
        backends: probes.KERNEL_QUESTIONS | _select(probes, ("choose_backend", "get_compatible_backends")),
    }
    for module, names in added.items():
        for name, value in names.items():
            setattr(module, name, value)
    faces = {"natten.version": {"__version__": natten.__version__}, **_FACES}
    faces |= {f"natten.natten{rank}d": _names_of_rank(rank) for rank in (1, 2, 3)}
    for path, contents in faces.items():
        face = ModuleType(path, "A module of older NATTEN releases; see natten.compat.")
        face.__dict__.update(contents)
        if path == "natten.utils":
            face.__path__ = []
        sys.modules[path] = face
        parent, _, name = path.rpartition(".")
        setattr(sys.modules[parent], name, face)
    for rank in (1, 2, 3):
        _make_importable(getattr(functional, f"na{rank}d"), f"natten.na{rank}d", _names_of_rank(rank))


def _make_importable(function: Any, path: str, names: dict[str, Any]) -> None:
    """Let code import a function as the module of the same name that NATTEN 0.17 had, and names from it."""
    function.__dict__.update(names)
    function.__spec__ = ModuleSpec(path, None)
    sys.modules[path] = function
