"""Figures of a run for other programs to show: TensorBoard, W&B, one long table."""
