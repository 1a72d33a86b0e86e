"""The model's segments and their arithmetic."""
