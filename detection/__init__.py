"""Detection: scripts around natzoo.openmmlab."""
