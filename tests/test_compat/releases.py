"""Public names of NATTEN releases by module.

Listed are the modules that models and training code import. Not listed are modules of kernels and their tuning, which
do not exist here: autotuner, flex, nested, ops, token_permute, backends, profiling_utils, and module variables such as
loggers.
"""

from __future__ import annotations

RELEASES: dict[str, dict[str, str]] = {
    "0.14.6": {
        "natten": "NeighborhoodAttention1D NeighborhoodAttention2D __version__",
        "natten.flops": "add_natten_handle av_1d_flop av_flop get_flops qk_1d_rpb_flop qk_rpb_flop",
        "natten.functional": """
            NATTEN1DAVFunction NATTEN1DQKRPBFunction NATTEN2DAVFunction NATTEN2DQKRPBFunction natten1dav natten1dqk
            natten1dqkrpb natten2dav natten2dqk natten2dqkrpb
        """,
        "natten.natten1d": "NeighborhoodAttention1D",
        "natten.natten2d": "NeighborhoodAttention2D",
    },
    "0.15.1": {
        "natten": """
            NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D __version__ disable_gemm_na
            disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na has_bfloat has_cuda
            has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm
        """,
        "natten.flops": """
            add_natten_handle av_1d_flop av_2d_flop av_3d_flop get_flops qk_1d_rpb_flop qk_2d_rpb_flop
            qk_3d_rpb_flop
        """,
        "natten.functional": """
            NeighborhoodAttention1DAVAutogradFunction NeighborhoodAttention1DQKAutogradFunction
            NeighborhoodAttention2DAVAutogradFunction NeighborhoodAttention2DQKAutogradFunction
            NeighborhoodAttention3DAVAutogradFunction NeighborhoodAttention3DQKAutogradFunction disable_gemm_na
            disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na get_device_cc has_bfloat
            has_cuda has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm na1d_av na1d_qk na1d_qk_with_bias
            na2d_av na2d_qk na2d_qk_with_bias na3d_av na3d_qk na3d_qk_with_bias natten1dav natten1dqk natten1dqkrpb
            natten2dav natten2dqk natten2dqkrpb natten3dav natten3dqk natten3dqkrpb
        """,
        "natten.natten1d": "NeighborhoodAttention1D",
        "natten.natten2d": "NeighborhoodAttention2D",
        "natten.natten3d": "NeighborhoodAttention3D",
        "natten.utils": "NoneType check_additional_keys check_additional_values make_attn_tensor_from_input",
        "natten.utils.tensor": "check_additional_keys check_additional_values make_attn_tensor_from_input",
        "natten.utils.testing": """
            skip_if_cuda_is_not_supported skip_if_gemm_does_not_support_double_precision
            skip_if_gemm_is_not_supported skip_if_nested_is_not_supported
        """,
        "natten.utils.typing": "NoneType",
    },
    "0.17.5": {
        "natten": """
            NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D __version__
            are_deterministic_algorithms_enabled disable_autotuner disable_gemm_na disable_tf32 disable_tiled_na
            enable_gemm_na enable_tf32 enable_tiled_na force_flex_attention get_memory_usage_preference has_bfloat
            has_cuda has_fna has_fp32_gemm has_fp64_gemm has_fused_na has_gemm has_half has_tf32_gemm
            is_autotuner_enabled is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward
            is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward is_fna_enabled is_fused_na_enabled
            is_gemm_na_enabled is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict
            is_memory_usage_unrestricted is_tf32_in_gemm_na_enabled is_tiled_na_enabled set_memory_usage_preference
            use_autotuner use_deterministic_algorithms use_flex_attention use_fna use_fused_na use_gemm_na
            use_kv_parallelism_in_fused_na use_tf32_in_gemm_na use_tiled_na
        """,
        "natten.context": """
            AutotunerContext MemoryUsagePreference NattenContext are_deterministic_algorithms_enabled
            disable_autotuner disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32
            enable_tiled_na force_flex_attention get_memory_usage_preference has_bfloat has_cuda has_fna
            has_fp32_gemm has_fp64_gemm has_fused_na has_gemm has_half has_tf32_gemm is_autotuner_enabled
            is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward is_autotuner_thorough_for_backward
            is_autotuner_thorough_for_forward is_fna_enabled is_fused_na_enabled is_gemm_na_enabled
            is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict
            is_memory_usage_unrestricted is_tf32_in_gemm_na_enabled is_tiled_na_enabled set_memory_usage_preference
            should_force_flex_attention should_use_flex_attention use_autotuner use_deterministic_algorithms
            use_flex_attention use_fna use_fused_na use_gemm_na use_kv_parallelism_in_fused_na use_tf32_in_gemm_na
            use_tiled_na
        """,
        "natten.experimental": """
            FlopCountFn custom_mapping na1d na1d_flop_count na1d_op_fake na1d_torch_library_op na2d na2d_flop_count
            na2d_op_fake na2d_torch_library_op na3d na3d_flop_count na3d_op_fake na3d_torch_library_op
        """,
        "natten.flops": "add_natten_handle fna_flop_count get_flops has_fvcore na_av_flop_count na_qk_flop_count",
        "natten.functional": """
            FusedNeighborhoodAttention1D FusedNeighborhoodAttention2D FusedNeighborhoodAttention3D
            NeighborhoodAttention1DAVAutogradFunction NeighborhoodAttention1DQKAutogradFunction
            NeighborhoodAttention2DAVAutogradFunction NeighborhoodAttention2DQKAutogradFunction
            NeighborhoodAttention3DAVAutogradFunction NeighborhoodAttention3DQKAutogradFunction na1d na1d_av na1d_qk
            na2d na2d_av na2d_qk na3d na3d_av na3d_qk
        """,
        "natten.na1d": "NeighborhoodAttention1D",
        "natten.na2d": "NeighborhoodAttention2D",
        "natten.na3d": "NeighborhoodAttention3D",
        "natten.natten1d": "NeighborhoodAttention1D",
        "natten.natten2d": "NeighborhoodAttention2D",
        "natten.natten3d": "NeighborhoodAttention3D",
        "natten.types": """
            CausalArg1DType CausalArg1DTypeOrDed CausalArg2DType CausalArg2DTypeOrDed CausalArg3DType
            CausalArg3DTypeOrDed CausalArgType Dimension1DType Dimension1DTypeOrDed Dimension2DType
            Dimension2DTypeOrDed Dimension3DType Dimension3DTypeOrDed DimensionType FnaBackwardConfigType
            FnaForwardConfigType FnaTileShapeType ListOrNestedTensor NoneType create_causal_arg_from_bool
            create_dim_from_int
        """,
        "natten.utils": """
            check_additional_keys check_additional_values check_all_args check_backward_tiling_config
            check_causal_arg check_dilation_arg check_input_size_arg check_kernel_size_arg check_tiling_config
            get_device_cc get_num_na_weights make_attn_tensor_from_input
        """,
        "natten.utils.checks": """
            check_all_args check_backward_tiling_config check_causal_arg check_dilation_arg check_input_size_arg
            check_kernel_size_arg check_tiling_config get_num_na_weights
        """,
        "natten.utils.log": "LogLevel get_logger log_format",
        "natten.utils.misc": "get_device_cc",
        "natten.utils.tensor": "check_additional_keys check_additional_values make_attn_tensor_from_input",
        "natten.utils.testing": """
            fna_supports_additional_kv skip_if_cuda_is_not_supported skip_if_experimental_ops_are_not_supported
            skip_if_fna_is_not_supported skip_if_fvcore_is_not_available
            skip_if_gemm_does_not_support_double_precision skip_if_gemm_is_not_supported
            skip_if_nested_is_not_supported skip_if_torch_compile_is_not_supported
            skip_if_torch_flop_count_is_not_supported skip_if_triton_is_not_supported
        """,
    },
    "0.20.1": {
        "natten": """
            HAS_LIBNATTEN NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D __version__
            allow_flex_compile allow_flex_compile_backprop are_deterministic_algorithms_enabled attention
            disable_flex_compile disable_flex_compile_backprop get_bwd_configs_for_cutlass_fmha
            get_bwd_configs_for_cutlass_fna get_configs_for_cutlass_blackwell_fmha
            get_configs_for_cutlass_blackwell_fna get_configs_for_cutlass_fmha get_configs_for_cutlass_fna
            get_configs_for_cutlass_hopper_fmha get_configs_for_cutlass_hopper_fna get_configs_for_flex_fmha
            get_configs_for_flex_fna get_memory_usage_preference is_flex_compile_allowed
            is_flex_compile_backprop_allowed is_kv_parallelism_in_fused_na_enabled is_memory_usage_default
            is_memory_usage_strict is_memory_usage_unrestricted merge_attentions na1d na2d na3d
            set_memory_usage_preference use_deterministic_algorithms use_kv_parallelism_in_fused_na
        """,
        "natten.attn_merge": "maybe_torch_compile merge_attentions_compile merge_attentions_fn",
        "natten.context": """
            MemoryUsagePreference NattenContext allow_flex_compile allow_flex_compile_backprop
            are_deterministic_algorithms_enabled disable_flex_compile disable_flex_compile_backprop
            get_memory_usage_preference is_flex_compile_allowed is_flex_compile_backprop_allowed
            is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict
            is_memory_usage_unrestricted set_memory_usage_preference use_deterministic_algorithms
            use_kv_parallelism_in_fused_na
        """,
        "natten.functional": "attention merge_attentions na1d na2d na3d neighborhood_attention_generic",
        "natten.modules": """
            NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D NeighborhoodAttentionGeneric
        """,
        "natten.types": """
            CausalArg1DType CausalArg1DTypeOrDed CausalArg2DType CausalArg2DTypeOrDed CausalArg3DType
            CausalArg3DTypeOrDed CausalArgType CausalArgTypeOrDed CutlassBlackwellFmhaForwardConfigType
            CutlassBlackwellFnaForwardConfigType CutlassFmhaBackwardConfigType CutlassFmhaForwardConfigType
            CutlassFnaBackwardConfigType CutlassFnaForwardConfigType CutlassHopperFmhaForwardConfigType
            CutlassHopperFnaForwardConfigType Dimension1DType Dimension1DTypeOrDed Dimension2DType
            Dimension2DTypeOrDed Dimension3DType Dimension3DTypeOrDed DimensionType DimensionTypeOrDed
            FlexFmhaForwardConfigType FlexFnaForwardConfigType FmhaForwardConfigType KernelSchedule NoneType
            QKTileShapeType
        """,
        "natten.utils.checks": """
            additional_kv_tensor_checks check_all_args check_args_against_input check_causal_arg check_dilation_arg
            check_input_size_arg check_kernel_schedule check_kernel_size_arg check_stride_arg check_tile_shape
            fmha_tensor_checks is_self_attention log_or_raise_error na_tensor_checks
        """,
        "natten.utils.device": "get_device_cc is_cpu is_cuda is_rocm",
        "natten.utils.log": "LogLevel get_logger log_format",
        "natten.utils.tensor": "check_additional_keys check_additional_values make_attn_tensor_from_input",
        "natten.utils.testing": """
            skip_if_blackwell_kernels_not_supported skip_if_cuda_is_not_supported
            skip_if_flex_compile_is_not_supported skip_if_flex_is_not_supported skip_if_hopper_kernels_not_supported
            skip_if_libnatten_is_not_supported skip_if_not_running_extended_tests supports_bfloat16 supports_float16
        """,
        "natten.utils.tuples": "ceil_div_int ceil_div_tuple create_causal_arg_from_bool create_dim_from_int",
        "natten.version": "__version__",
    },
    "0.21.6": {
        "natten": """
            HAS_LIBNATTEN NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D __version__
            allow_flex_compile allow_flex_compile_backprop are_deterministic_algorithms_enabled attention
            disable_flex_compile disable_flex_compile_backprop get_bwd_configs_for_cutlass_blackwell_fmha
            get_bwd_configs_for_cutlass_blackwell_fna get_bwd_configs_for_cutlass_fmha
            get_bwd_configs_for_cutlass_fna get_bwd_configs_for_cutlass_hopper_fmha
            get_bwd_configs_for_cutlass_hopper_fna get_configs_for_cutlass_blackwell_fmha
            get_configs_for_cutlass_blackwell_fna get_configs_for_cutlass_fmha get_configs_for_cutlass_fna
            get_configs_for_cutlass_hopper_fmha get_configs_for_cutlass_hopper_fna get_configs_for_flex_fmha
            get_configs_for_flex_fna get_memory_usage_preference is_flex_compile_allowed
            is_flex_compile_backprop_allowed is_kv_parallelism_in_fused_na_enabled is_memory_usage_default
            is_memory_usage_strict is_memory_usage_unrestricted merge_attentions na1d na2d na3d
            set_memory_usage_preference use_deterministic_algorithms use_kv_parallelism_in_fused_na
        """,
        "natten.attn_merge": "MergeAttentionsAutogradFn merge_attentions",
        "natten.context": """
            MemoryUsagePreference NattenContext allow_flex_compile allow_flex_compile_backprop
            are_deterministic_algorithms_enabled disable_flex_compile disable_flex_compile_backprop
            get_memory_usage_preference is_flex_compile_allowed is_flex_compile_backprop_allowed
            is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict
            is_memory_usage_unrestricted set_memory_usage_preference use_deterministic_algorithms
            use_kv_parallelism_in_fused_na
        """,
        "natten.functional": "attention na1d na2d na3d neighborhood_attention_generic",
        "natten.modules": """
            NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D NeighborhoodAttentionGeneric
        """,
        "natten.types": """
            CausalArg1DType CausalArg1DTypeOrDed CausalArg2DType CausalArg2DTypeOrDed CausalArg3DType
            CausalArg3DTypeOrDed CausalArgType CausalArgTypeOrDed CutlassBlackwellFmhaBackwardConfigType
            CutlassBlackwellFmhaForwardConfigType CutlassBlackwellFnaBackwardConfigType
            CutlassBlackwellFnaForwardConfigType CutlassFmhaBackwardConfigType CutlassFmhaForwardConfigType
            CutlassFnaBackwardConfigType CutlassFnaForwardConfigType CutlassHopperFmhaBackwardConfigType
            CutlassHopperFmhaForwardConfigType CutlassHopperFnaBackwardConfigType CutlassHopperFnaForwardConfigType
            Dimension1DType Dimension1DTypeOrDed Dimension2DType Dimension2DTypeOrDed Dimension3DType
            Dimension3DTypeOrDed DimensionType DimensionTypeOrDed FlexFmhaForwardConfigType FlexFnaForwardConfigType
            FmhaForwardConfigType KernelSchedule NoneType QKTileShapeType
        """,
        "natten.utils.checks": """
            additional_kv_tensor_checks check_all_args check_args_against_input check_causal_arg check_dilation_arg
            check_input_size_arg check_kernel_schedule check_kernel_size_arg check_stride_arg check_tile_shape
            fmha_tensor_checks is_self_attention log_or_raise_error na_tensor_checks varlen_tensor_checks
        """,
        "natten.utils.device": "get_device_cc is_cpu is_cuda is_rocm",
        "natten.utils.dtype": "is_fp8 is_full is_half",
        "natten.utils.environment": """
            DISABLE_TORCH_OPS is_torch_compiling parse_env_flag parse_env_int parse_env_str
        """,
        "natten.utils.log": "LogLevel NattenLogger get_logger log_format",
        "natten.utils.tensor": "check_additional_keys check_additional_values make_attn_tensor_from_input",
        "natten.utils.testing": """
            skip_if_blackwell_kernels_not_supported skip_if_cuda_is_not_supported
            skip_if_flex_compile_is_not_supported skip_if_flex_is_not_supported skip_if_hopper_kernels_not_supported
            skip_if_libnatten_is_not_supported skip_if_not_running_extended_tests supports_bfloat16 supports_float16
        """,
        "natten.utils.tuples": """
            ceil_div_int ceil_div_tuple create_causal_arg_from_bool create_dim_from_int mul_tuple sub_tuple
        """,
        "natten.utils.varlen": "generate_varlen_parameters",
        "natten.version": "__version__",
    },
}

# Modules and names that are missing here, and why.
EXCLUDED: dict[str, str] = {
    "natten.utils.varlen": "sequences of several lengths are not supported",
    "natten.utils.checks.varlen_tensor_checks": "sequences of several lengths are not supported",
    "natten.utils.environment.DISABLE_TORCH_OPS": "a switch of NATTEN's build",
    "natten.experimental.na1d_torch_library_op": "registration of NATTEN's own operators",
    "natten.experimental.na1d_op_fake": "registration of NATTEN's own operators",
    "natten.experimental.na1d_flop_count": "registration of NATTEN's own operators",
    "natten.experimental.na2d_torch_library_op": "registration of NATTEN's own operators",
    "natten.experimental.na2d_op_fake": "registration of NATTEN's own operators",
    "natten.experimental.na2d_flop_count": "registration of NATTEN's own operators",
    "natten.experimental.na3d_torch_library_op": "registration of NATTEN's own operators",
    "natten.experimental.na3d_op_fake": "registration of NATTEN's own operators",
    "natten.experimental.na3d_flop_count": "registration of NATTEN's own operators",
    "natten.experimental.custom_mapping": "registration of NATTEN's own operators",
    "natten.experimental.FlopCountFn": "registration of NATTEN's own operators",
    "natten.attn_merge.maybe_torch_compile": "a part of merge_attentions",
    "natten.attn_merge.merge_attentions_fn": "a part of merge_attentions",
    "natten.attn_merge.merge_attentions_compile": "a part of merge_attentions",
    "natten.attn_merge.MergeAttentionsAutogradFn": "a part of merge_attentions",
}
