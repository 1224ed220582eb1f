# Parts of all Mask2Formers. The backbone: DiNAT-Large, whose 7x7 windows were stretched to 11x11, pretrained on
# ImageNet-22K.
_base_ = []

backbone = dict(
    _delete_=True,
    type="DiNAT",
    arch="dinat_large_21k_11x11",
    drop_path_rate=0.3,
    dilations=[[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1, 1, 1, 1, 1]],
    init_cfg=dict(type="Pretrained", checkpoint="dinat_large_21k_11x11"),
)
# Its learning rate is a tenth of the heads'; norms and position biases do not decay. The longest name that fits counts.
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
# What every run has, as runtime.py gives it to UPerNet.
two_checkpoints = dict(checkpoint=dict(max_keep_ckpts=2))
tensorboard = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
# For mmdet, whose data ends with each epoch: where it never ends, a resumed run goes on in the middle of it. Crops are
# padded to one size, so none are grouped by their shapes.
endless = dict(sampler=dict(type="InfiniteSampler"), batch_sampler=None)
