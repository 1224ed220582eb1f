"""Training, evaluation and use of image classifiers; the scripts run from anywhere."""
