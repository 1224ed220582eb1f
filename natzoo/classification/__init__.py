"""Training, evaluation and use of image classifiers; the scripts run from anywhere.

Three scripts, and what they are assembled from, from the data to the run:
readers.py, shards.py (where images come from) · images.py (data sets, seeds) · augmentation.py · loaders.py (batches) ·
models.py · parts.py (loss, optimizer, schedule) · evaluation.py, real_labels.py · devices.py · world.py (processes) ·
interruption.py (signals) · checkpoints.py · runlog.py · options.py · train.py · validate.py · predict.py
"""
