"""Segmentation: scripts around natzoo.openmmlab."""
