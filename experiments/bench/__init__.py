"""What a step costs, ours and others'."""
