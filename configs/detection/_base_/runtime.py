# Common to all runs: register the backbones, log to TensorBoard, keep two checkpoints.
_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["natzoo.openmmlab"])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
