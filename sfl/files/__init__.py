"""Values to bytes and back: JSON, torch files, checksums, also of strangers' files."""
