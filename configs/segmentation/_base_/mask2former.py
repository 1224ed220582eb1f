# Settings shared by all Mask2Former configs. The backbone is DiNAT-Large, pretrained on ImageNet-22K with 7x7 windows;
# its position biases are resized to 11x11 windows.
_base_ = []

backbone = dict(
    _delete_=True,
    type="DiNAT",
    arch="dinat_large_21k_11x11",
    drop_path_rate=0.3,
    dilations=[[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1, 1, 1, 1, 1]],
    init_cfg=dict(type="Pretrained", checkpoint="dinat_large_21k_11x11"),
)
# The backbone's learning rate is a tenth of that of the heads. Its norms and position biases have no weight decay. If
# several keys match a parameter, the longest applies.
undecayed = dict(lr_mult=0.1, decay_mult=0.0)
custom_keys = {
    "backbone": dict(lr_mult=0.1, decay_mult=1.0),
    "attn.rpb": undecayed,
    "patch_embed.norm": undecayed,
    "downsample.norm": undecayed,
    "backbone.norm": undecayed,
    **{f"blocks.{block}.norm": undecayed for block in range(18)},
    "query_embed": dict(lr_mult=1.0, decay_mult=0.0),
    "query_feat": dict(lr_mult=1.0, decay_mult=0.0),
    "level_embed": dict(lr_mult=1.0, decay_mult=0.0),
}
# Common to all runs, as in runtime.py for UPerNet.
two_checkpoints = dict(checkpoint=dict(max_keep_ckpts=2))
tensorboard = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
# With an infinite sampler, a resumed run continues at its position in the data (see SkipSeenDataHook). Crops are padded
# to one size, so images need not be grouped by aspect ratio.
endless = dict(sampler=dict(type="InfiniteSampler"), batch_sampler=None)
