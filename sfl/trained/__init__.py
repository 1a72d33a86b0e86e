"""Using a trained model: predictions, here or with its back on another machine."""
